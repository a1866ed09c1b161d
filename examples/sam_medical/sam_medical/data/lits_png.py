"""LiTS: liver and liver tumours in CT, as PNG slices in the public layout, 2 labels.

``dataset_6/dataset_6/volume-V_S.png`` with ``segmentation-V_livermask_S.png`` and ``segmentation-V_lesionmask_S.png``,
which are RGB with the values 0 and 1. The split is by patient: of every ten, one is for validation and two are for
the test. The published code splits shuffled slices, so nearly identical neighbours end up in different splits. The
splits that begin with "parity" repeat this. Use them only to compare with the published figures.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.base import (
    TURNS,
    Sample,
    SegmentationDataset,
    check_same_size,
    read_image,
    read_mask,
    require_folder,
)
from sam_medical.data.reading import Reading

LABELS = {"liver": "livermask", "tumor": "lesionmask"}
SLICE = re.compile(r"volume-(\d+)_(\d+)\.png$")
HOLDING = "volume-0_0.png and so on, or dataset_6"


class LitsPng(SegmentationDataset):
    splits = ("train", "validation", "test", "parity-train", "parity-validation", "parity-test")
    labels = tuple(LABELS)

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        root = require_folder(root, "lits-png", HOLDING)
        folders = (root / "dataset_6" / "dataset_6", root / "dataset_6", root)
        slices = next((found for folder in folders if (found := _slices_in(folder))), [])
        turns = TURNS[split.removeprefix("parity-")]
        if split.startswith("parity-"):
            order = np.random.default_rng(0).permutation(len(slices))
            slices = [slices[index] for place, index in enumerate(order) if place % 10 in turns]
        else:
            patients = sorted({patient for (patient, _), _ in slices})
            chosen = {patient for place, patient in enumerate(patients) if place % 10 in turns}
            slices = [item for item in slices if item[0][0] in chosen]
        self.images = [path for _, path in slices]
        if not self.images:
            raise UserError(
                f"{root} holds no slices of the split {split}; --data-root must be the folder that holds {HOLDING}."
            )
        for image in self.images:
            for mask in _masks_of(image):
                if not mask.is_file():
                    raise UserError(f"{image} has no mask; put {mask.name} beside it, or remove the slice.")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        image = read_image(self.images[index], self.reading)
        masks = []
        for path in _masks_of(self.images[index]):
            mask = read_mask(path) > 0  # values are 0 and 1, so a threshold of 127 would not work
            check_same_size(image, mask, path)
            masks.append(mask)
        stem = self.images[index].stem
        return Sample(stem, image, np.stack(masks), group=stem.rsplit("_", 1)[0])


def _slices_in(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Returns ((patient, number), file) of each slice in a folder, sorted; nothing if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(
        ((int(match[1]), int(match[2])), path) for path in folder.iterdir() if (match := SLICE.fullmatch(path.name))
    )


def _masks_of(image: Path) -> list[Path]:
    patient, number = image.stem.removeprefix("volume-").split("_")
    return [image.with_name(f"segmentation-{patient}_{kind}_{number}.png") for kind in LABELS.values()]
