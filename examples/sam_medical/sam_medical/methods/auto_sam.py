"""AutoSAM (arXiv:2306.06370): a network makes the prompt from the image."""

from __future__ import annotations

from sam_medical.methods.method import Method

AUTO_SAM = Method(
    "AutoSAM",
    "AutoSAM (arXiv:2306.06370)",
    departs="a U-Net makes the prompt in place of a HarDNet",
    prompts="image",
    trained=("image prompts",),
    learning_rate=1e-3,
)
