"""Text-prompted SAM: pretrained backbones, prompts, text encoders, and networks without SAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sam_medical.common.registry import Registry

if TYPE_CHECKING:
    from sam_medical.models.backbone import Backbone

# The keys are names, or the `model_type` in the config.json of a Hub name or folder.
BACKBONES: Registry[type[Backbone]] = Registry(
    "backbone",
    {
        "lite-medsam": "sam_medical.models.lite_medsam:LiteMedSam",
        "sam": "sam_medical.models.sam:Sam",
    },
    has="encode",
)
