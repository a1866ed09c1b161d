"""GlaS / Warwick-QU: glands in colon histology, in the public flat layout.

``Warwick_QU_Dataset/{train,testA,testB}_N.bmp`` with ``{train,testA,testB}_N_anno.bmp`` beside each, whose values
above zero are gland. Other image extensions with the same stems are read as well. Since the published code selects
its checkpoint on the test images, validation images are held out of train here: every sixth of them by number.
"""

from __future__ import annotations

import re
from pathlib import Path

from ssam.data.base import Sample, SegmentationDataset, find_stem, read_image, read_mask, require_folder
from ssam.errors import UserError

FOLDER = "Warwick_QU_Dataset"
EXTENSIONS = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
HOLD_OUT_EVERY = 6


class Glas(SegmentationDataset):
    splits = ("train", "validation", "test", "testA", "testB")
    labels = ("glands",)

    def __init__(self, root: Path | None, split: str) -> None:
        super().__init__(root, split)
        root = require_folder(root, "glas", FOLDER)
        folder = root / FOLDER if (root / FOLDER).is_dir() else root
        self.images = [folder_path for folder_path in _numbered_images(folder, _file_prefix(split))]
        if split in ("train", "validation"):
            self.images = [
                path for path in self.images if (_number(path) % HOLD_OUT_EVERY == 0) == (split == "validation")
            ]
        if not self.images:
            raise UserError(
                f"{folder} holds no images of the split {split}, named like {_file_prefix(split)}_1.bmp; "
                f"--data-root must be the folder that holds {FOLDER}."
            )
        self.masks = [_mask_of(path) for path in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        image, mask = read_image(self.images[index]), read_mask(self.masks[index]) > 0
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"{self.masks[index]} is {mask.shape[1]}x{mask.shape[0]} pixels, its image "
                f"{image.shape[1]}x{image.shape[0]}; download the pair again."
            )
        return Sample(self.images[index].stem, image, mask[None])


def _file_prefix(split: str) -> str:
    """The paper's test images are testA; testB is apart because it is harder."""
    return {"validation": "train", "test": "testA"}.get(split, split)


def _numbered_images(folder: Path, prefix: str) -> list[Path]:
    pattern = re.compile(rf"{prefix}_\d+")
    images = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and pattern.fullmatch(path.stem)]
    return sorted(images, key=_number)


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def _mask_of(image: Path) -> Path:
    mask = find_stem(image.parent, f"{image.stem}_anno", EXTENSIONS)
    if mask is None:
        raise UserError(f"{image} has no mask; put {image.stem}_anno{image.suffix} beside it, or remove the image.")
    return mask
