"""SAM as it is, prompted by names, points or boxes."""

from __future__ import annotations

from sam_medical.methods.method import Method, PromptedBackbone
from sam_medical.models import prompts

ZERO_SHOT_TEXT = Method("zero-shot, text", "SAM with an untrained text affine layer")
ZERO_SHOT_POINT = Method(
    "zero-shot, point",
    "SAM with a point in each label",
    model=PromptedBackbone(prompts.POINT),
    departs="one point for all of a label's parts in an image",
)
ZERO_SHOT_BOX = Method(
    "zero-shot, box",
    "SAM with the box around each label",
    model=PromptedBackbone(prompts.BOX),
    departs="one box around all of a label's parts in an image",
)
