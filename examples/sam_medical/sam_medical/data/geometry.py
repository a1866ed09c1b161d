"""Where the voxels of a volume are in the patient: orientation, and whether two files lie on each other.

Affines map voxel indices to millimetres, rightwards, forwards and upwards (RAS+), as nibabel has it. A volume is
looked at as (slices, rows, columns): flips and permutations of what the file holds, never interpolated.
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

# Where slices, rows and columns go in each plane: the front of an axial slice, and the top of the others, is above.
PLANES = {"axial": "SPR", "coronal": "AIR", "sagittal": "RIP"}
# As adapters made before the planes were given saw a volume: along its last axis, whatever that was.
STORED = "stored"
# Of the smallest voxel side: what rounding in headers may come to.
TOLERANCE = 0.1


def orientation_of(affine: np.ndarray) -> str:
    """In letters, such as RAS."""
    ends = (("L", "R"), ("P", "A"), ("I", "S"))
    return "".join(ends[int(axis)][int(direction > 0)] for axis, direction in io_orientation(affine))


def is_usable(affine: np.ndarray) -> bool:
    """Whether each axis of the volume goes somewhere of its own."""
    return bool(np.isfinite(affine).all() and np.isfinite(io_orientation(affine)).all())


def turn_to_plane(affine: np.ndarray, plane: str) -> np.ndarray:
    """The flips and permutations, as nibabel writes them, from a file's axes to (slices, rows, columns)."""
    if plane == STORED:
        # From (X, Y, Z): slices along Z, rows along Y from its end, columns along X.
        return np.array([[2, 1], [1, -1], [0, 1]])
    return ornt_transform(io_orientation(affine), axcodes2ornt(tuple(PLANES[plane])))


def turned(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """A view of the volume (X, Y, Z, ...) in that orientation."""
    return apply_orientation(values, turn)


def turned_back(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """What `turned` has turned, as it was."""
    inverse = np.zeros_like(turn)
    for axis, (target, direction) in enumerate(turn):
        inverse[int(target)] = (axis, direction)
    return apply_orientation(values, inverse)


def onto_grid(
    values: np.ndarray, affine: np.ndarray, grid_shape: tuple[int, ...], grid_affine: np.ndarray
) -> tuple[np.ndarray, float]:
    """A volume by flips and permutations as near to another grid as they can bring it, and the distance left.

    Returns:
        The volume, and how far apart the farthest corners are, in millimetres.
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
    """The farthest that two volumes' corners are apart, in millimetres."""
    ends = [_corners(shape or other_shape, affine), _corners(other_shape, other)]
    return float(np.linalg.norm(ends[0] - ends[1], axis=1).max())


def tolerance(affine: np.ndarray) -> float:
    return TOLERANCE * float(voxel_sizes(affine).min())


def resampled(
    values: np.ndarray, affine: np.ndarray, grid_shape: tuple[int, ...], grid_affine: np.ndarray
) -> np.ndarray:
    """The value of the nearest voxel at each point of another grid; zero outside."""
    from nibabel.nifti1 import Nifti1Image
    from nibabel.processing import resample_from_to

    source = Nifti1Image(values.astype(np.float64), affine)
    nearest = resample_from_to(source, (grid_shape, grid_affine), order=0)
    return np.asarray(nearest.dataobj).astype(values.dtype)


def ras_affine(spacing: tuple[float, ...], origin: tuple[float, ...], direction: tuple[float, ...]) -> np.ndarray:
    """From what ITK says of a volume, whose millimetres go leftwards and backwards (LPS+)."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    indices = np.array(list(product(*((0, size - 1) for size in shape))), dtype=float)
    return apply_affine(affine, indices)
