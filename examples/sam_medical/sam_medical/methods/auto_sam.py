"""AutoSAM (arXiv:2306.06370): a network computes the prompt from the image."""

from __future__ import annotations

from sam_medical.methods.method import Method, PromptedBackbone
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.models import prompts

AUTO_SAM = Method(
    "AutoSAM",
    "AutoSAM (arXiv:2306.06370)",
    model=PromptedBackbone(prompts.IMAGE),
    tuner=InPlaceTuner(parts=("prompts",)),
    departs="a U-Net makes the prompt in place of a HarDNet",
    learning_rate=1e-3,
)
