"""Reads 2D images from sources: slices of a volume, pages of a stack, or a single image. Caches decoded files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.decoding import NIFTI, Scan, affine_in_mm, is_one_picture, suffix_of
from sam_medical.data.geometry import (
    PLANES,
    STORED,
    onto_grid,
    resampled,
    tolerance,
    turn_to_plane,
    turned,
)
from sam_medical.data.intensity import LEGACY, parse_intensity, to_channels
from sam_medical.data.offset import BY_IMAGE, check_offset, without_offset
from sam_medical.data.sources import Source

# Cache size for decoded files. Beyond it, shuffled slices decode their files again.
KEPT_BYTES = 2 * 1024**3
# Cached 2D images. Only the current image and its masks are read repeatedly.
KEPT_PICTURES = 16


@dataclass(frozen=True)
class Reading:
    """How files are read. The defaults are those of older adapters, which did not store these settings.

    Attributes:
        intensity: The intensity mapping; see `sam_medical.data.intensity`.
        plane: The plane of slices of a volume: a name in `PLANES`, or `STORED`.
        resample_masks: Whether masks on another grid are resampled to the grid of their image.
        modality: The modality of the images, if known from elsewhere than the files.
        offset: The offset of stored CT values; see `sam_medical.data.offset`.
    """

    intensity: str = LEGACY
    plane: str = "axial"
    resample_masks: bool = False
    modality: str = ""
    offset: str = BY_IMAGE

    def __post_init__(self) -> None:
        parse_intensity(self.intensity)
        check_offset(self.offset)
        if self.plane not in (*PLANES, STORED):
            raise UserError(f"plane is {self.plane!r}, but it must be one of {', '.join((*PLANES, STORED))}.")


@dataclass(frozen=True)
class Layer:
    """One slice of a mask file: values (H, W) or (H, W, 3), and attributes of its `Scan`."""

    path: Path
    values: np.ndarray
    indices: np.ndarray | None
    grey_palette: bool
    alpha: np.ndarray | None
    lossy: bool


def numbers_of(source: Source, plane: str) -> Sequence[int | None]:
    """Returns the numbers of a source's slices or pages; [None] for a 2D image."""
    if is_one_picture(source.path):
        return [None]
    shape, affine, is_stack = probe(source)
    if not is_stack:
        return [None]
    return range(shape[_slice_axis(affine, plane)])


def probe(source: Source) -> tuple[tuple[int, ...], np.ndarray | None, bool]:
    """Returns the shape, the affine (None for 2D images and stacks), and whether the source is a volume or a stack."""
    if suffix_of(source.path.name) in NIFTI and not source.files:
        scan = _header_of_nifti(source)
        if scan is not None:
            return scan
    decoded = scan_of(source)
    return decoded.values.shape[:3], decoded.affine, decoded.is_stack


def scan_of(source: Source) -> Scan:
    """Decodes a source, or returns it from the cache."""
    return _KEPT.get((source.path, source.files), source.decode)


def image_scan_of(source: Source, reading: Reading) -> Scan:
    """Decodes an image, or returns it from the cache, with the offset of CT values removed."""
    if reading.intensity == LEGACY:
        return scan_of(source)
    return _KEPT.get((source.path, source.files, reading.offset), lambda: as_read(scan_of(source), reading))


def as_read(scan: Scan, reading: Reading) -> Scan:
    return scan if reading.intensity == LEGACY else without_offset(scan, reading.offset)


def name_of(source: Source, number: int | None) -> str:
    return source.flat_name if number is None else f"{source.flat_name}_{number:03}"


def read_slice(source: Source, number: int | None, reading: Reading) -> np.ndarray:
    """Reads a slice as (H, W, 3), float32 between zero and one."""
    scan = image_scan_of(source, reading)
    plane = _pictures(scan.values, scan.affine, reading.plane)[number or 0]
    return to_channels(plane, scan, parse_intensity(reading.intensity), reading.modality)


def read_layer(mask: Source, image: Source, number: int | None, reading: Reading) -> Layer:
    """Reads the slice of a mask file that belongs to a slice of its image.

    Raises:
        UserError: if mask and image are not on the same grid.
    """
    scan = _KEPT.get(
        (mask.path, mask.files, image.path, image.files), lambda: _on_its_image(mask, image, reading.resample_masks)
    )
    place = number or 0

    def picture(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else _pictures(values, scan.affine, reading.plane)[place]

    values = picture(scan.values)
    assert values is not None
    return Layer(mask.path, values, picture(scan.indices), scan.grey_palette, picture(scan.alpha), scan.lossy)


def check_grid(mask: Source, image: Source, resample: bool) -> None:
    """Raises a `UserError` if a mask is not on the grid of its image. Reads headers only, where they suffice."""
    shape, affine, _ = probe(image)
    mask_shape, mask_affine, _ = probe(mask)
    if (affine is None) != (mask_affine is None):
        raise UserError(
            f"{_name(mask)} is {_kind(mask_affine, mask_shape)}, and its image {image.path.name} is "
            f"{_kind(affine, shape)}; save both in one form."
        )
    if affine is None or mask_affine is None:
        if shape != mask_shape:
            raise UserError(
                f"{_name(mask)} is {_pixels(mask_shape)}, its image {_pixels(shape, False)} ({image.path.name}); "
                "use the image and the mask that belong together."
            )
        return
    if not resample:
        _check_distance(mask, image, (mask_shape, mask_affine), (shape, affine))


def _check_distance(
    mask: Source,
    image: Source,
    mask_grid: tuple[tuple[int, ...], np.ndarray],
    image_grid: tuple[tuple[int, ...], np.ndarray],
) -> None:
    shape, affine = image_grid
    empty = np.broadcast_to(np.uint8(0), mask_grid[0])
    on_grid, distance = onto_grid(empty, mask_grid[1], shape, affine)
    if on_grid.shape == shape and distance <= tolerance(affine):
        return
    sizes = f"{_size(mask_grid[0])} voxels and {_size(shape)}"
    raise UserError(
        f"{_name(mask)} does not lie on its image {image.path}: {sizes}, and corners up to {distance:.4g} mm apart. "
        "Give --resample-masks true to take the nearest voxels, or use the image and the mask that belong together."
    )


def _on_its_image(mask: Source, image: Source, resample: bool) -> Scan:
    check_grid(mask, image, resample)
    scan = scan_of(mask)
    shape, affine, _ = probe(image)
    if affine is None or scan.affine is None:
        return scan
    values, distance = onto_grid(scan.values, scan.affine, shape, affine)
    if values.shape[:3] != shape or distance > tolerance(affine):
        values = resampled(scan.values, scan.affine, shape, affine)
    return replace(scan, values=values, affine=affine)


def _header_of_nifti(source: Source) -> tuple[tuple[int, ...], np.ndarray, bool] | None:
    """Returns the result of `probe` from the header; None if the file is invalid, which decoding reports."""
    import nibabel

    try:
        file: Any = nibabel.load(source.path)
        shape = tuple(file.shape)
    except Exception:
        return None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3 or not shape or 0 in shape:
        return None
    return (*shape, *(1,) * (3 - len(shape))), affine_in_mm(file), True


def _pictures(values: np.ndarray, affine: np.ndarray | None, plane: str) -> np.ndarray:
    return values if affine is None else turned(values, turn_to_plane(affine, plane))


def _slice_axis(affine: np.ndarray | None, plane: str) -> int:
    if affine is None:
        return 0
    targets = turn_to_plane(affine, plane)[:, 0]
    return int(np.flatnonzero(targets == 0)[0])


def _name(source: Source) -> str:
    return str(source.path)


def _kind(affine: np.ndarray | None, shape: tuple[int, ...]) -> str:
    return f"a picture of {_pixels(shape)}" if affine is None else f"a volume of {_size(shape)}"


def _pixels(shape: tuple[int, ...], unit: bool = True) -> str:
    pages = f"{shape[0]} pages of " if shape[0] > 1 else ""
    return f"{pages}{shape[2]}x{shape[1]}" + (" pixels" if unit else "")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class _Kept:
    """A cache of decoded files. A lock per file prevents two threads from decoding the same one."""

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._scans: OrderedDict[Any, Scan] = OrderedDict()
        self._lock = RLock()
        self._reading: dict[Any, RLock] = {}

    def get(self, key: Any, read: Callable[[], Scan]) -> Scan:
        key = (*key, *(_stamp(path) for path in key if isinstance(path, Path)))
        with self._lock:
            lock = self._reading.setdefault(key, RLock())
        with lock:
            scan = self._scans.get(key)
            if scan is None:
                scan = read()
        with self._lock:
            self._reading.pop(key, None)
            self._keep(key, scan)
        return scan

    def _keep(self, key: Any, scan: Scan) -> None:
        self._scans[key] = scan
        self._scans.move_to_end(key)
        pictures = [other for other, one in self._scans.items() if not one.is_stack]
        for other in pictures[:-KEPT_PICTURES]:
            del self._scans[other]
        while len(self._scans) > 1 and sum(one.nbytes for one in self._scans.values()) > self._kept_bytes:
            self._scans.popitem(last=False)


def _stamp(path: Path) -> tuple[int, int]:
    """Returns the modification time and size of a file, so a rewritten file misses the cache."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


_KEPT = _Kept(KEPT_BYTES)
