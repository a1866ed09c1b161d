"""All of SAM learns, prompted with the names of the labels."""

from __future__ import annotations

from sam_medical.methods.method import Method
from sam_medical.methods.tuners import InPlaceTuner

FULL_FINE_TUNING = Method(
    "full fine-tuning",
    "all of SAM, prompted with the label's name",
    tuner=InPlaceTuner(parts=("image encoder", "default prompt", "mask decoder", "prompts")),
    learning_rate=2e-4,
)
