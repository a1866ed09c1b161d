"""Volumes as NIfTI files, read slice by slice along their last axis."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ssam.errors import UserError, first_line
from ssam.files import replacing_file

VOLUMES = (".nii", ".nii.gz")
# Of decompressed volumes; shuffled slices of more than that read theirs again.
KEPT_BYTES = 2 * 1024**3


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUMES) and not path.name.startswith(".")


def without_suffix(name: str) -> str:
    suffix = next(suffix for suffix in VOLUMES if name.lower().endswith(suffix))
    return name[: -len(suffix)]


def slices_of(path: Path) -> Sequence[int | None]:
    """The numbers of a volume's slices; None for a picture, which is all there is."""
    return range(shape_of(path)[2]) if is_volume(path) else [None]


def name_of_slice(path: Path, number: int) -> str:
    return f"{without_suffix(path.name)}_{number:03}"


def shape_of(path: Path) -> tuple[int, int, int]:
    """Of a volume, from its header.

    Raises:
        UserError: if the file is not NIfTI, or has not three dimensions.
    """
    shape = _open(path).shape
    if len(shape) != 3:
        raise UserError(f"{path} has {len(shape)} dimensions, and not three; split it into volumes.")
    return shape


def read_image_slice(path: Path, number: int) -> np.ndarray:
    """A slice (H, W) as float32, zero at the volume's lowest value, one at its highest; NaN counts as the lowest."""
    values, low, high = _VOLUMES.get(path)
    plane = np.nan_to_num(_upright(values[:, :, number]).astype(np.float32), nan=low)
    return ((plane - low) / max(high - low, 1e-8)).clip(0, 1)


def read_mask_slice(path: Path, number: int) -> np.ndarray:
    """A slice of a mask's values (H, W), int.

    Raises:
        UserError: if some of them are not numbers.
    """
    plane = _upright(_VOLUMES.get(path)[0][:, :, number])
    if not np.isfinite(plane).all():
        raise UserError(f"{path} holds values that are no numbers, in slice {number}; a mask must hold whole numbers.")
    return np.rint(plane).astype(int)


def write_mask_volume(path: Path, slices: Sequence[np.ndarray], like: Path) -> None:
    """Masks (H, W) of all slices as one NIfTI file, 0 and 1, placed in space as the volume that they are of."""
    import nibabel

    source = _open(like)
    values = np.stack([mask[::-1].T for mask in slices], axis=-1).astype(np.uint8)
    volume = nibabel.Nifti1Image(values, source.affine)
    with replacing_file(path) as temporary:  # whose name ends as the path's, which tells nibabel to compress
        nibabel.save(volume, temporary)


class _Volumes:
    """The volumes read last. One thread reads at a time, so that none is read twice at once."""

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._volumes: OrderedDict[Path, tuple[np.ndarray, float, float]] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path) -> tuple[np.ndarray, float, float]:
        """A file's values (X, Y, slices), and the lowest and the highest of them that is a number."""
        with self._lock:
            if path not in self._volumes:
                self._volumes[path] = _read(path)
                while len(self._volumes) > 1 and self._bytes() > self._kept_bytes:
                    self._volumes.popitem(last=False)
            self._volumes.move_to_end(path)
            return self._volumes[path]

    def _bytes(self) -> int:
        return sum(values.nbytes for values, _, _ in self._volumes.values())


_VOLUMES = _Volumes(KEPT_BYTES)


def _read(path: Path) -> tuple[np.ndarray, float, float]:
    file = _open(path)
    try:
        values = np.asanyarray(file.dataobj)
    except Exception as error:
        raise _unreadable(path, error) from error
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UserError(f"{path} holds no numbers; replace or remove the file.")
    return values, float(finite.min()), float(finite.max())


def _open(path: Path) -> Any:
    """A NIfTI file, of which only the header has been read."""
    import nibabel

    try:
        return nibabel.load(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as NIfTI ({first_line(error)}); replace or remove the file.")


def _upright(plane: np.ndarray) -> np.ndarray:
    """An (X, Y) plane as rows and columns of a picture, Y upwards as in NIfTI's own orientation."""
    return np.ascontiguousarray(plane.T[::-1])
