"""Axial slices of the MNI152 T1 brain MRI, which nilearn carries: nothing to download.

Labels come from the template's own tissue probabilities: gray or white matter where its probability is above one
half, brain where the skull-stripped brain mask is. The volume is cut into slabs that go to train, validation and
test in turn. Neighbouring slices are nearly the same picture, so three slices are left out between slabs; and each
test slab that shows a brain lies between two train slabs, since anatomy beyond the trained range is another task.
"""

from __future__ import annotations

from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.base import Sample, SegmentationDataset
from sam_medical.data.reading import Reading

# Slabs in turn, each with its number of slices, and the slices left out between two of them.
SLABS = (("train", 11), ("test", 5), ("train", 11), ("validation", 3))
GAP = 3
# Where the cycle of slabs starts: test slabs then lie among trained anatomy, and the tapering ends of the brain, from
# which labels vanish one by one, are for training and validation. The last slices, above the brain, are blank.
CYCLE_START = -22
DEPTH = 162
# The field of view: the box around the brain, and a margin of eight millimetres.
LEFT, RIGHT = 18, 179
BACK, FRONT = 19, 216
TISSUE_PROBABILITY = 0.5


class BrainMri(SegmentationDataset):
    splits = ("train", "validation", "test")
    labels = ("brain", "gray matter", "white matter")

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        if root is not None:
            raise UserError(
                f"brain-mri takes no --data-root, since nilearn carries it; give --dataset own for images in {root}, "
                "or the name of another dataset."
            )
        self.t1, self.label_volumes = _load_volumes()
        self.slices = slices_of(split)

    def __len__(self) -> int:
        return len(self.slices)

    def read(self, index: int) -> Sample:
        z = self.slices[index]
        image = _upright(self.t1[:, :, z])
        masks = np.stack([_upright(volume[:, :, z]) for volume in self.label_volumes])
        return Sample(f"mni152_axial_{z:03d}", np.repeat(image[..., None], 3, axis=2), masks, group="mni152")


def slices_of(split: str) -> list[int]:
    """The slices of a split, as indices along the template's third axis."""
    chosen: list[int] = []
    start = CYCLE_START
    for name, thickness in cycle(SLABS):
        if start >= DEPTH:
            break
        if name == split:
            chosen.extend(range(max(start, 0), min(start + thickness, DEPTH)))
        start += thickness + GAP
    return chosen


@cache
def _load_volumes() -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """T1 (X, Y, Z) between zero and one, and one bool volume a label."""
    from nilearn import datasets

    t1, gray, white = (
        np.asarray(load().dataobj, dtype=np.float32)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    brain = np.asarray(datasets.load_mni152_brain_mask().dataobj) > 0
    return t1, (brain, gray > TISSUE_PROBABILITY, white > TISSUE_PROBABILITY)


def _upright(plane: np.ndarray) -> np.ndarray:
    """The field of view of an (X, Y) plane as rows and columns of a picture, the face at the top."""
    return np.ascontiguousarray(plane[LEFT:RIGHT, BACK:FRONT].T[::-1])
