"""CholecSeg8k: frames of gall bladder surgery, 12 labels, in the public layout.

``videoNN/videoNN_FFFFF/frame_K_endo.png`` with ``frame_K_endo_watershed_mask.png`` beside it, a label map
of grey values. The split is by video, as in the paper. The paper's test set is every tenth frame of its test videos.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.base import (
    Sample,
    SegmentationDataset,
    check_same_size,
    read_image,
    read_mask,
    require_folder,
    require_known_values,
)
from sam_medical.data.reading import Reading

# Decimal values. Kaggle's table prints them as if they were hexadecimal.
VALUES = {
    "abdominal wall": 11,
    "liver": 21,
    "gastrointestinal tract": 13,
    "fat": 12,
    "grasper": 31,
    "connective tissue": 23,
    "blood": 24,
    "cystic duct": 25,
    "L-hook electrocautery": 32,
    "gallbladder": 22,
    "hepatic vein": 33,
    "liver ligament": 5,
}
BACKGROUND, UNLABELLED, BORDER = 50, 0, 255
VIDEOS = {
    "train": (1, 9, 18, 20, 24, 25, 26, 28, 35, 37, 43, 55),
    "validation": (12, 27),
    "test": (17, 52),
}
TEST_EVERY = 10
FRAME = re.compile(r"video(\d+)_(\d+)/frame_(\d+)_endo\.png$", re.IGNORECASE)
HOLDING = "video01, video09 and so on"


class CholecSeg8k(SegmentationDataset):
    splits = ("train", "validation", "test", "test-all")
    labels = tuple(VALUES)

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        root = require_folder(root, "cholecseg8k", HOLDING)
        videos = VIDEOS["test" if split == "test-all" else split]
        frames = sorted(
            (tuple(map(int, match.groups())), path)
            for path in root.rglob("frame_*_endo.png")
            if (match := FRAME.search(path.as_posix()))
        )
        self.images = [path for (video, _, _), path in frames if video in videos]
        if split == "test":
            self.images = self.images[::TEST_EVERY]
        if not self.images:
            names = ", ".join(f"video{video:02}" for video in videos)
            raise UserError(
                f"{root} holds no frames of the split {split}, videoNN/videoNN_FFFFF/frame_K_endo.png of {names}; "
                f"--data-root must be the folder that holds {HOLDING}."
            )
        self.masks = [path.with_name(f"{path.stem}_watershed_mask.png") for path in self.images]
        for image, mask in zip(self.images, self.masks, strict=True):
            if not mask.is_file():
                raise UserError(f"{image} has no mask; put {mask.name} beside it, or remove the frame.")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        path = self.images[index]
        image, values = read_image(path, self.reading), read_mask(self.masks[index])
        check_same_size(image, values, self.masks[index])
        require_known_values(values, {*VALUES.values(), BACKGROUND, UNLABELLED, BORDER}, self.masks[index])
        masks = np.stack([values == value for value in VALUES.values()])
        return Sample(f"{path.parent.name}_{path.stem}", image, masks, group=path.parent.parent.name)
