"""Images and masks of one's own: two folders, and the names of the labels.

``images/`` holds the images and ``masks/`` what belongs to each, under the same stem, in one of two ways:

- one mask an image, whose values are the labels', as ``labels.json`` beside the folders says:
  {"liver": 1, "tumor": 2}; zero is background;
- or a folder of black and white masks for each label, ``masks/liver``, ``masks/tumor``; an image that has no mask in
  one of them does not have that label.

Both folders may also hold volumes as NIfTI files, .nii or .nii.gz, which are read slice by slice along their last
axis. Where there are folders ``train``, ``validation`` and ``test`` that each hold ``images`` and ``masks``, they are
the splits; otherwise of every ten images, or volumes, in the order of their names, one is for validation and two are
for the test. Neighbouring slices or frames that are pictures of their own would then be in several splits: give such
images folders for each split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssam.data.base import (
    EXTENSIONS,
    Sample,
    SegmentationDataset,
    check_same_size,
    images_by_stem,
    read_image,
    read_mask,
    require_folder,
    require_known_values,
    stretched,
)
from ssam.errors import UserError, first_line

VOLUMES = (".nii", ".nii.gz")
TURNS = {"train": (0, 1, 2, 4, 5, 6, 8), "validation": (3,), "test": (7, 9)}
HOLDING = "images, masks and labels.json"


class OwnData(SegmentationDataset):
    splits = ("train", "validation", "test")

    def __init__(self, root: Path | None, split: str) -> None:
        super().__init__(root, split)
        root = require_folder(root, "own", HOLDING)
        has_splits = any((root / name / "images").is_dir() for name in self.splits)
        folder = root / split if has_splits else root
        self.values = _read_label_values(folder, root)
        self.mask_folder = require_folder(folder / "masks", "own", "a mask for each image, or a folder for each label")
        self.labels: Sequence[str] = tuple(self.values or _label_folders(self.mask_folder))
        images = _files(require_folder(folder / "images", "own", "the images"))
        if not has_splits:
            images = {stem: path for place, (stem, path) in enumerate(images.items()) if place % 10 in TURNS[split]}
        if not images:
            raise UserError(
                f"{folder / 'images'} holds no images for the split {split}; it may hold "
                f"{', '.join((*EXTENSIONS, *VOLUMES))}, ten or more if there are no folders train and so on."
            )
        # One a label, None where an image does not have it; or one for all labels.
        folders = [self.mask_folder] if self.values else [self.mask_folder / label for label in self.labels]
        masks = [_files(path) for path in folders]
        self.items: list[tuple[Path, list[Path | None], int | None]] = []
        for stem, image in images.items():
            of_image = [files.get(stem) for files in masks]
            if not any(of_image):
                raise UserError(
                    f"{image} has no mask {stem} in {self.mask_folder}; add it, blank if there is nothing to see, or "
                    "remove the image."
                )
            self.items += [(image, of_image, number) for number in _slices(image, of_image)]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Sample:
        path, mask_paths, number = self.items[index]
        image = _image(path, number)
        group = "" if number is None else _without_suffix(path.name)
        name = path.stem if number is None else f"{group}_{number:03}"
        masks = []
        for mask_path in mask_paths:
            if mask_path is None:
                masks.append(np.zeros(image.shape[:2], dtype=int))
                continue
            masks.append(_mask(mask_path, number))
            check_same_size(image, masks[-1], mask_path)
        if not self.values:
            return Sample(name, image, np.stack([mask > 0 for mask in masks]), group)
        assert mask_paths[0] is not None
        require_known_values(masks[0], {0, *self.values.values()}, mask_paths[0])
        return Sample(name, image, np.stack([masks[0] == value for value in self.values.values()]), group)


def _read_label_values(folder: Path, root: Path) -> dict[str, int]:
    """What ``labels.json`` says, beside the images or above the splits; nothing if there is none."""
    for path in (folder / "labels.json", root / "labels.json"):
        if path.is_file():
            break
    else:
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    whole = isinstance(values, dict) and all(type(value) is int and value > 0 for value in values.values())
    if not whole or not values or len(set(values.values())) < len(values):
        raise UserError(
            f'{path} must give each label a whole number of its own above zero, {{"liver": 1, "tumor": 2}}.'
        )
    return values


def _label_folders(masks: Path) -> list[str]:
    labels = sorted(path.name for path in masks.iterdir() if path.is_dir() and not path.name.startswith((".", "@")))
    if not labels:
        raise UserError(
            f"the labels of {masks} are unknown: put a labels.json beside it, "
            f'{{"liver": 1, "tumor": 2}}, or the masks into a folder for each label.'
        )
    return labels


def _files(folder: Path) -> dict[str, Path]:
    """Images and volumes by lower-case stem, in the order of their names."""
    volumes = {_without_suffix(path.name.lower()): path for path in folder.iterdir() if _is_volume(path)}
    images = images_by_stem(folder)
    for stem in volumes.keys() & images.keys():
        raise UserError(f"{folder} holds both {volumes[stem].name} and {images[stem].name}; remove one of the two.")
    return dict(sorted((images | volumes).items()))


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUMES) and not path.name.startswith(".")


def _without_suffix(name: str) -> str:
    suffix = next(suffix for suffix in VOLUMES if name.lower().endswith(suffix))
    return name[: -len(suffix)]


def _slices(image: Path, masks: list[Path | None]) -> Sequence[int | None]:
    """The slices of a volume, by their numbers; None for a picture."""
    if not _is_volume(image):
        return [None]
    shape = _open_volume(image).shape
    if len(shape) != 3:
        raise UserError(f"{image} has {len(shape)} dimensions, and not three; split it into volumes.")
    for mask in masks:
        if mask is not None and (not _is_volume(mask) or _open_volume(mask).shape != shape):
            raise UserError(f"{mask} is not a volume of {' x '.join(map(str, shape))}, as its image {image.name} is.")
    return range(shape[2])


def _open_volume(path: Path) -> Any:
    """A NIfTI file, of which only the header has been read."""
    import nibabel

    try:
        return nibabel.load(path)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as NIfTI ({first_line(error)}); replace or remove the file."
        ) from error


# Enough for one volume with the masks of a dozen labels; shuffled slices read their volume again.
@lru_cache(maxsize=16)
def _volume(path: Path) -> tuple[np.ndarray, float, float]:
    """A NIfTI file's values, (X, Y, slices) in float32, with the lowest and the highest of them."""
    file = _open_volume(path)
    try:
        values = np.asarray(file.dataobj, dtype=np.float32)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as NIfTI ({first_line(error)}); replace or remove the file."
        ) from error
    return values, float(values.min()), float(values.max())


def _image(path: Path, number: int | None) -> np.ndarray:
    if number is None:
        return read_image(path)
    values, low, high = _volume(path)
    return np.repeat(_upright(stretched(values[:, :, number], low, high))[..., None], 3, axis=2)


def _mask(path: Path, number: int | None) -> np.ndarray:
    return read_mask(path) if number is None else _upright(np.rint(_volume(path)[0][:, :, number]).astype(int))


def _upright(plane: np.ndarray) -> np.ndarray:
    """An (X, Y) plane as rows and columns of a picture, Y upwards as in NIfTI's own orientation."""
    return np.ascontiguousarray(plane.T[::-1])
