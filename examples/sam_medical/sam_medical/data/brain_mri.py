"""Axial slices of the MNI152 T1 brain MRI. The file is part of nilearn, so nothing is downloaded.

Labels come from the template's tissue probabilities: gray or white matter where the probability exceeds one half,
and brain inside the skull-stripped brain mask. The volume is cut into slabs, which go to train, validation and test
in turn. Three slices are left out between slabs, because neighbouring slices are nearly identical. Each test slab
that shows brain lies between two train slabs, so the test does not require extrapolation to unseen anatomy.
"""

from __future__ import annotations

from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.base import Sample, SegmentationDataset
from sam_medical.data.reading import Reading

# The repeated sequence of slabs, each with its number of slices; and the number of slices between two slabs.
SLABS = (("train", 11), ("test", 5), ("train", 11), ("validation", 3))
GAP = 3
# The first slice of the cycle of slabs. It places test slabs inside the trained anatomy. The tapering ends of the
# brain, where labels vanish one after the other, go to train and validation. The last slices show no brain.
CYCLE_START = -22
DEPTH = 162
# The field of view: the bounding box of the brain plus a margin of 8 mm.
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
    """Returns the slices of a split, as indices along the template's third axis."""
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
    """Returns T1 (X, Y, Z) between zero and one, and one bool volume per label."""
    from nilearn import datasets

    t1, gray, white = (
        np.asarray(load().dataobj, dtype=np.float32)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    brain = np.asarray(datasets.load_mni152_brain_mask().dataobj) > 0
    return t1, (brain, gray > TISSUE_PROBABILITY, white > TISSUE_PROBABILITY)


def _upright(plane: np.ndarray) -> np.ndarray:
    """Crops an (X, Y) plane to the field of view and returns rows and columns, with anterior at the top."""
    return np.ascontiguousarray(plane[LEFT:RIGHT, BACK:FRONT].T[::-1])
