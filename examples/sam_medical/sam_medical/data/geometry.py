"""Orientation of volumes, and whether two volumes share a grid.

Affines map voxel indices to millimetres in RAS+, as in nibabel. Slices are cut from a volume as (slices, rows,
columns) by flips and permutations of its axes, without interpolation.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

# Direction of slices, rows and columns per plane. Anterior is at the top of axial slices, superior of the others.
PLANES = {"axial": "SPR", "coronal": "AIR", "sagittal": "RIP"}
# The plane of older adapters: slices along the last stored axis, whatever its direction.
STORED = "stored"
# Share of the smallest voxel side, for the rounding of headers.
TOLERANCE = 0.1


def orientation_of(affine: np.ndarray) -> str:
    """Returns the orientation as letters, such as RAS."""
    ends = (("L", "R"), ("P", "A"), ("I", "S"))
    return "".join(ends[int(axis)][int(direction > 0)] for axis, direction in io_orientation(affine))


def is_usable(affine: np.ndarray) -> bool:
    """Whether an affine is finite and its axes are independent."""
    return bool(np.isfinite(affine).all() and np.isfinite(io_orientation(affine)).all())


def turn_to_plane(affine: np.ndarray, plane: str) -> np.ndarray:
    """Returns nibabel's orientation transform from the stored axes to (slices, rows, columns)."""
    if plane == STORED:
        # From (X, Y, Z): slices along Z, rows along Y from its end, columns along X.
        return np.array([[2, 1], [1, -1], [0, 1]])
    return ornt_transform(io_orientation(affine), axcodes2ornt(tuple(PLANES[plane])))


def turned(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Applies an orientation transform to a volume (X, Y, Z, ...). The result is a view."""
    return apply_orientation(values, turn)


def turned_back(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Inverts `turned`."""
    inverse = np.zeros_like(turn)
    for axis, (target, direction) in enumerate(turn):
        inverse[int(target)] = (axis, direction)
    return apply_orientation(values, inverse)


def onto_grid(
    values: np.ndarray, affine: np.ndarray, grid_shape: tuple[int, ...], grid_affine: np.ndarray
) -> tuple[np.ndarray, float]:
    """Flips and permutes the axes of a volume to match another grid as closely as possible.

    Returns:
        The volume, and the largest distance between corresponding corners, in millimetres.
    """
    if values.shape[:3] == grid_shape and corner_distance(affine, grid_affine, grid_shape) <= tolerance(grid_affine):
        return values, 0.0
    turn = ornt_transform(io_orientation(affine), io_orientation(grid_affine))
    turned_affine = affine @ inv_ornt_aff(turn, values.shape[:3])
    result = turned(values, turn)
    return result, corner_distance(turned_affine, grid_affine, grid_shape, result.shape[:3])


def corner_distance(
    affine: np.ndarray, other: np.ndarray, other_shape: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> float:
    """Returns the largest distance between corresponding corners of two volumes, in millimetres."""
    ends = [_corners(shape or other_shape, affine), _corners(other_shape, other)]
    return float(np.linalg.norm(ends[0] - ends[1], axis=1).max())


def tolerance(affine: np.ndarray) -> float:
    return TOLERANCE * float(voxel_sizes(affine).min())


def resampled(
    values: np.ndarray, affine: np.ndarray, grid_shape: tuple[int, ...], grid_affine: np.ndarray
) -> np.ndarray:
    """Resamples a volume onto another grid by nearest neighbour; zero outside of the volume."""
    from nibabel.nifti1 import Nifti1Image
    from nibabel.processing import resample_from_to

    source = Nifti1Image(values.astype(np.float64), affine)
    nearest = resample_from_to(source, (grid_shape, grid_affine), order=0)
    return np.asarray(nearest.dataobj).astype(values.dtype)


def ras_affine(spacing: tuple[float, ...], origin: tuple[float, ...], direction: tuple[float, ...]) -> np.ndarray:
    """Returns the RAS+ affine of an ITK image, whose coordinates are LPS+. Spacing and origin are in millimetres."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    indices = np.array(list(product(*((0, size - 1) for size in shape))), dtype=float)
    return apply_affine(affine, indices)
