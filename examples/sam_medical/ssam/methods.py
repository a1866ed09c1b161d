"""What is trained, said through PEFT alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssam.backbones import PositionalEmbedding
from ssam.lite_medsam import RelativePositionBias
from ssam.model import TextPromptedSam
from svdtune import SVDScaleShiftConfig

POSITION_TYPES = (PositionalEmbedding, RelativePositionBias)


def ssam_config(model: TextPromptedSam, target_modules: str) -> SVDScaleShiftConfig:
    """S-SAM: scale and shift in the encoder; its norms, its positions and the text affine layer trained whole.

    Args:
        target_modules: Regular expression of the layers whose singular values are tuned.
    """
    trained_whole = [
        f"image_encoder.{name}"
        for name, module in model.image_encoder.named_modules()
        if isinstance(module, (nn.LayerNorm, *POSITION_TYPES))
    ]
    return SVDScaleShiftConfig(target_modules=target_modules, modules_to_save=[*trained_whole, "text_affine"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer.

    Only the text affine layer's matrix decays: decay pulls A towards zero, which is not the identity.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decaying if ".text_affine." in name and parameter.ndim == 2 else others).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
