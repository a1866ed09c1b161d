"""GlaS / Warwick-QU: glands in colon histology, in the public flat layout.

``Warwick_QU_Dataset/{train,testA,testB}_N.bmp`` with ``{train,testA,testB}_N_anno.bmp`` beside each;
mask values above zero are gland. Other image extensions with the same stems work too. The published code selects its
checkpoint on the test images. Here every sixth training image, by number, is held out for validation instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sam_medical.common.errors import UserError
from sam_medical.data.base import (
    Sample,
    SegmentationDataset,
    check_same_size,
    images_by_stem,
    read_image,
    read_mask,
    require_folder,
)
from sam_medical.data.reading import Reading

FOLDER = "Warwick_QU_Dataset"
HOLD_OUT_EVERY = 6


class Glas(SegmentationDataset):
    splits = ("train", "validation", "test", "testA", "testB")
    labels = ("glands",)

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        root = require_folder(root, "glas", FOLDER)
        folder = root / FOLDER if (root / FOLDER).is_dir() else root
        files = images_by_stem(folder)
        stems = _stems_of(split, files)
        if not stems:
            raise UserError(
                f"{folder} holds no images of the split {split}, named like {_file_prefix(split)}_1.bmp; "
                f"--data-root must be the folder that holds {FOLDER}."
            )
        for stem in stems:
            if f"{stem}_anno" not in files:
                image = files[stem]
                raise UserError(
                    f"{image} has no mask; put {image.stem}_anno{image.suffix} beside it, or remove the image."
                )
        self.images = [files[stem] for stem in stems]
        self.masks = [files[f"{stem}_anno"] for stem in stems]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        image, mask = read_image(self.images[index], self.reading), read_mask(self.masks[index]) > 0
        check_same_size(image, mask, self.masks[index])
        return Sample(self.images[index].stem, image, mask[None])


def _file_prefix(split: str) -> str:
    """Returns the first part of a split's file names. The paper's test set is testA; testB is harder."""
    return {"validation": "train", "test": "testA"}.get(split, split)


def _stems_of(split: str, stems: Iterable[str]) -> list[str]:
    """Returns the lower-case stems of a split, sorted by number."""
    pattern = re.compile(rf"{_file_prefix(split).lower()}_(\d+)")
    numbered = sorted((int(match[1]), match[0]) for match in map(pattern.fullmatch, stems) if match)
    if split in ("train", "validation"):
        numbered = [pair for pair in numbered if (pair[0] % HOLD_OUT_EVERY == 0) == (split == "validation")]
    return [stem for _, stem in numbered]
