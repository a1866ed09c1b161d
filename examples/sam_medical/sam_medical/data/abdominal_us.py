"""Abdominal ultrasound, simulated and real, 8 labels, in the public layout.

``abdominal_US/abdominal_US/{AUS,RUS}/{images,annotations}/{train,test}/``: AUS is simulated, RUS is real. Masks are
colour images with anti-aliased edges. The paper trains on simulated images of twelve patients and tests on real
images; `RealUltrasound` trains and tests on the real images, in five folds.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from scipy import ndimage

from sam_medical.common.errors import UserError
from sam_medical.data.base import (
    Sample,
    SegmentationDataset,
    check_same_size,
    images_by_stem,
    read_colours,
    read_image,
    require_folder,
)
from sam_medical.data.reading import Reading

COLOURS = {
    "liver": (100, 0, 100),
    "kidney": (255, 255, 0),
    "pancreas": (0, 0, 255),
    "vessels": (255, 0, 0),
    "adrenals": (0, 255, 255),
    "gallbladder": (0, 255, 0),
    "bones": (255, 255, 255),
    "spleen": (255, 0, 255),
}
BACKGROUNDS = ((0, 0, 0), (10, 10, 10), (10, 0, 10))
# A smooth edge between two colours can pass near a third colour. Smaller components are such edges, not organs.
SPECK_PIXELS = 30
SIMULATED = {"train": range(1, 13), "validation": range(13, 16)}
PATIENT = re.compile(r"ct(\d+)", re.IGNORECASE)
FOLDER = "abdominal_US"


class Ultrasound(SegmentationDataset):
    """Simulated images for training and validation, real images for the test, as in the paper."""

    splits: tuple[str, ...] = ("train", "validation", "test")  # type: ignore[misc]
    labels = tuple(COLOURS)

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        folder = _inner_folder(require_folder(root, "abdominal-us", FOLDER))
        if split == "test":
            pairs = _pairs(folder / "RUS", "test")
        else:
            pairs = [
                (image, mask)
                for image, mask in _pairs(folder / "AUS", "train")
                if (match := PATIENT.match(image.stem)) and int(match[1]) in SIMULATED[split]
            ]
            if not pairs:
                first, last = SIMULATED[split][0], SIMULATED[split][-1]
                raise UserError(
                    f"{folder / 'AUS'} holds no images/train of the split {split}, ct{first}-... to ct{last}-....jpg."
                )
        self.images, self.masks = map(list, zip(*pairs, strict=True))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        image, masks = read_image(self.images[index], self.reading), masks_in_colours(self.masks[index])
        check_same_size(image, masks[0], self.masks[index])
        return Sample(self.images[index].stem, image, masks)


class RealUltrasound(Ultrasound):
    """The real images in five folds: one for the test, the next one for validation, three for training.

    A fold is a run of consecutive names, because consecutive frames are nearly identical."""

    folds = 5

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None, fold: int = 1) -> None:
        super().__init__(root, "test", reading)
        self.split = split
        held_out = {"test": fold - 1, "validation": fold % self.folds}
        count = len(self.images)
        fold_of = [index * self.folds // count for index in range(count)]
        chosen = [
            index
            for index, fold in enumerate(fold_of)
            if fold == held_out.get(split) or (split == "train" and fold not in held_out.values())
        ]
        self.images = [self.images[index] for index in chosen]
        self.masks = [self.masks[index] for index in chosen]


def masks_in_colours(path: Path) -> np.ndarray:
    """Returns one bool mask per label, (K, H, W), by each pixel's nearest label colour, without small components."""
    pixels = read_colours(path).astype(np.int32)
    palette = np.array([*BACKGROUNDS, *COLOURS.values()], dtype=np.int32)
    # Pack each colour into one integer: numpy sorts integers about a hundred times faster than rows.
    numbers, where = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_inverse=True)
    colours = numbers[:, None] >> (16, 8, 0) & 255
    nearest = ((colours[:, None] - palette) ** 2).sum(2).argmin(1)[where].reshape(pixels.shape[:2])
    first = len(BACKGROUNDS)
    return np.stack([_without_specks(nearest == first + label) for label in range(len(COLOURS))])


def _without_specks(mask: np.ndarray) -> np.ndarray:
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return sizes[parts] > SPECK_PIXELS


def _inner_folder(root: Path) -> Path:
    """Returns the folder that holds AUS and RUS. The download nests it twice."""
    for folder in (root / FOLDER / FOLDER, root / FOLDER, root):
        if (folder / "RUS").is_dir() or (folder / "AUS").is_dir():
            return folder
    raise UserError(f"{root} holds neither AUS nor RUS; --data-root must be the folder that holds {FOLDER}.")


def _pairs(folder: Path, part: str) -> list[tuple[Path, Path]]:
    """Returns (image, mask) pairs, sorted by name."""
    folders = {kind: folder / kind / part for kind in ("images", "annotations")}
    for path in folders.values():
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; download the dataset again, or choose another split.")
    images, masks = (images_by_stem(path) for path in folders.values())
    for stem, image in images.items():
        if stem not in masks:
            raise UserError(
                f"{image} has no mask {stem}.png in {folders['annotations']}; add it, or remove the image."
            )
    if not images:
        raise UserError(f"{folders['images']} holds no images.")
    return [(image, masks[stem]) for stem, image in sorted(images.items(), key=lambda item: _by_number(item[0]))]


def _by_number(stem: str) -> list[tuple[int, str]]:
    """A sort key that compares digits as numbers, so a2 comes before a15."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", stem)]
