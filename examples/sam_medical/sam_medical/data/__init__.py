"""Datasets: one module per dataset, and the registry that finds them by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sam_medical.common.registry import Registry

if TYPE_CHECKING:
    from sam_medical.data.base import SegmentationDataset

DATASETS: Registry[type[SegmentationDataset]] = Registry(
    "dataset",
    {
        "brain-mri": "sam_medical.data.brain_mri:BrainMri",
        "cholecseg8k": "sam_medical.data.cholecseg8k:CholecSeg8k",
        "abdominal-us": "sam_medical.data.abdominal_us:Ultrasound",
        "abdominal-us-real": "sam_medical.data.abdominal_us:RealUltrasound",
        "chestx-det": "sam_medical.data.chestxdet:ChestXDet",
        "lits-png": "sam_medical.data.lits_png:LitsPng",
        "glas": "sam_medical.data.glas:Glas",
        "own": "sam_medical.data.own:OwnData",
    },
    has="splits",
)


def dataset_and_fold(name: str, fold: int | None = None) -> tuple[str, int | None]:
    """Returns a dataset's name and fold. Older versions put the fold into the name: abdominal-us-real-2."""
    match = re.fullmatch(r"(.+)-(\d{1,4})", name, re.ASCII)
    if fold is None and match and name not in DATASETS and match[1] in DATASETS:
        return match[1], int(match[2])
    return name, fold
