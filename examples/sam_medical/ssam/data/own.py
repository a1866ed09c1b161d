"""Images and masks of one's own: two folders, and the names of the labels.

``images/`` holds the images and ``masks/`` what belongs to each, under the same stem, in one of two ways:

- one mask an image, whose values are the labels', as ``labels.json`` beside the folders says:
  {"liver": 1, "tumor": 2}; zero is background;
- or a folder of black and white masks for each label, ``masks/liver``, ``masks/tumor``; an image that has no mask in
  one of them does not have that label, nor has a split that lacks the folder.

Both folders may also hold volumes as NIfTI files, .nii or .nii.gz, which are read slice by slice along their last
axis. Where there are folders ``train``, ``validation`` and ``test`` that each hold ``images`` and ``masks``, they are
the splits; otherwise of every ten images, or volumes, in the order of their names, one is for validation and two are
for the test. Neighbouring slices or frames that are pictures of their own would then be in several splits: give such
images folders for each split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssam.data.base import (
    EXTENSIONS,
    TURNS,
    Sample,
    SegmentationDataset,
    check_same_size,
    files_by_stem,
    read_image_or_slice,
    read_mask,
    require_folder,
    require_known_values,
    require_label_names,
)
from ssam.data.nifti import (
    VOLUMES,
    is_volume,
    name_of_slice,
    read_mask_slice,
    shape_of,
    slices_of,
    without_suffix,
)
from ssam.errors import UserError, first_line

HOLDING = "images, masks and labels.json"


class OwnData(SegmentationDataset):
    splits = ("train", "validation", "test")

    def __init__(self, root: Path | None, split: str) -> None:
        super().__init__(root, split)
        root = require_folder(root, "own", HOLDING)
        has_splits = any((root / name / "images").is_dir() for name in self.splits)
        folder = root / split if has_splits else root
        if has_splits and not folder.is_dir():
            raise UserError(f"{root} has folders for its splits, but none for {split}; add {folder / 'images'}.")
        self.values = _read_label_values(folder, root)
        for name, holding in (("images", "the images"), ("masks", "a mask for each, or a folder for each label")):
            if not (folder / name).is_dir():
                raise UserError(f"{folder} holds no folder {name}; add it, with {holding}.")
        self.mask_folder = folder / "masks"
        all_masks = [root / name / "masks" for name in self.splits] if has_splits else [self.mask_folder]
        self.labels: Sequence[str] = tuple(self.values or _label_folders(all_masks))
        images = all_images = files_by_stem(folder / "images")
        if not has_splits:
            images = {stem: path for place, (stem, path) in enumerate(images.items()) if place % 10 in TURNS[split]}
        if not images:
            kinds = ", ".join((*EXTENSIONS, *VOLUMES))
            raise UserError(
                f"{folder / 'images'} holds {len(all_images)} images, too few for the split {split}: give ten, or "
                f"folders train, validation and test. It may hold {kinds}."
            )
        # One a label, None where an image does not have it; or one for all labels.
        folders = [self.mask_folder] if self.values else [self.mask_folder / label for label in self.labels]
        masks = [files_by_stem(path) if path.is_dir() else {} for path in folders]
        self.items: list[tuple[Path, list[Path | None], int | None]] = []
        for stem, image in images.items():
            of_image = [files.get(stem) for files in masks]
            if not any(of_image):
                raise UserError(f"{image} has no mask {stem} in {self.mask_folder}; {self._advice_on_missing_masks()}")
            self.items += [(image, of_image, number) for number in _slices(image, of_image)]

    def _advice_on_missing_masks(self) -> str:
        inner = sorted(path.name for path in self.mask_folder.iterdir() if not path.name.startswith("."))
        if self.values and all((self.mask_folder / name).is_dir() for name in inner):
            return "labels.json says that each image has one mask for all labels: remove it to use folders of masks."
        return (
            "add it, blank if there is nothing to see, or remove the image. A mask has its image's name, and there is "
            f"{inner[0]}."
            if inner
            else "add it; there is none."
        )

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Sample:
        path, mask_paths, number = self.items[index]
        image = read_image_or_slice(path, number)
        group = "" if number is None else without_suffix(path.name)
        name = path.stem if number is None else name_of_slice(path, number)
        masks = []
        for mask_path in mask_paths:
            if mask_path is None:
                masks.append(np.zeros(image.shape[:2], dtype=int))
                continue
            masks.append(_read_mask(mask_path, number))
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
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}.") from error
    whole = isinstance(values, dict) and all(type(value) is int and value > 0 for value in values.values())
    if not whole or not values or len(set(values.values())) < len(values):
        raise UserError(
            f'{path} must give each label a whole number of its own above zero, {{"liver": 1, "tumor": 2}}.'
        )
    require_label_names(list(values), path)
    return values


def _label_folders(masks: Sequence[Path]) -> list[str]:
    """The names of the folders in any of these; a split may lack a label."""
    inner = [path for folder in masks if folder.is_dir() for path in folder.iterdir() if path.is_dir()]
    labels = sorted({path.name for path in inner if not path.name.startswith((".", "@"))})
    if not labels:
        raise UserError(
            f"the labels of {masks[0]} are unknown: put a labels.json beside it, "
            f'{{"liver": 1, "tumor": 2}}, or the masks into a folder for each label.'
        )
    require_label_names(labels, masks[0])
    return labels


def _slices(image: Path, masks: list[Path | None]) -> Sequence[int | None]:
    """The slices of a volume, by their numbers; None for a picture."""
    if is_volume(image):
        shape = shape_of(image)
        for mask in masks:
            if mask is not None and (not is_volume(mask) or shape_of(mask) != shape):
                size = " x ".join(map(str, shape))
                raise UserError(f"{mask} is not a volume of {size}, as its image {image.name} is.")
    return slices_of(image)


def _read_mask(path: Path, number: int | None) -> np.ndarray:
    return read_mask(path) if number is None else read_mask_slice(path, number)
