"""Datasets as users have them on disk: one module per dataset, one small interface for all."""

from __future__ import annotations

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
        **{f"abdominal-us-real-{fold}": f"sam_medical.data.abdominal_us:RealUltrasound{fold}" for fold in range(1, 6)},
        "chestx-det": "sam_medical.data.chestxdet:ChestXDet",
        "lits-png": "sam_medical.data.lits_png:LitsPng",
        "glas": "sam_medical.data.glas:Glas",
        "own": "sam_medical.data.own:OwnData",
    },
)
