"""All of SAM learns."""

from __future__ import annotations

from sam_medical.methods.method import Method

FULL_FINE_TUNING = Method(
    "full fine-tuning",
    "all of SAM, prompted with the label's name",
    trained=("image encoder", "default prompt", "mask decoder", "text affine"),
    learning_rate=2e-4,
)
