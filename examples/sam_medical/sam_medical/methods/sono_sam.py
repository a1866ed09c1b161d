"""SonoSAM (arXiv:2310.16872): a point per label; prompt encoder and decoder learn."""

from __future__ import annotations

from sam_medical.methods.method import Method

SONO_SAM = Method(
    "SonoSAM",
    "SonoSAM (arXiv:2310.16872)",
    departs="one point, without its rounds of corrections, and no distillation",
    prompts="point",
    trained=("prompt encoder", "mask decoder"),
    learning_rate=1e-3,
)
