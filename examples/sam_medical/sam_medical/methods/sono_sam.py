"""SonoSAM (arXiv:2310.16872): one point per label; prompt encoder and decoder learn."""

from __future__ import annotations

from sam_medical.methods.method import Method, PromptedBackbone
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.models import prompts

SONO_SAM = Method(
    "SonoSAM",
    "SonoSAM (arXiv:2310.16872)",
    model=PromptedBackbone(prompts.POINT),
    tuner=InPlaceTuner(parts=("prompt encoder", "mask decoder")),
    departs="one point, without its rounds of corrections, and no distillation",
    learning_rate=1e-3,
)
