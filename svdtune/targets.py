"""Default target modules, per model type and per class."""

from __future__ import annotations

from collections.abc import Sequence

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

_ENCODER_LAYERS = r".*layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_VISION_TRANSFORMER = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
    # names of the same layers in transformers 4
    *("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
]
_SAM = ["qkv", "proj", "lin1", "lin2"]
_SAM2 = ["qkv", "proj", "proj_in", "proj_out"]
# The official segment_anything package. The model may be the encoder alone.
_OFFICIAL_SAM = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))"
_SAM3 = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def _in_vision_encoder(names: list[str]) -> str:
    """A regular expression for layers of the image encoder. It skips the prompt encoder and the mask decoder."""
    return rf"(.*\.)?vision_encoder\..*\.({'|'.join(names)})"


def _copy_entry(names: Sequence[str]) -> list[str] | str:
    """Copies an entry of PEFT's table: a list of names or a regular expression."""
    return names if isinstance(names, str) else list(names)


# Language models: PEFT's defaults for LoRA. Vision models: the linear layers of all encoder blocks.
DEFAULT_TARGET_MODULES: dict[str, list[str] | str] = {
    **{kind: _copy_entry(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()},
    "sam": _in_vision_encoder(_SAM),
    "sam_hq": _in_vision_encoder(_SAM),
    "sam_vision_model": _SAM,
    "sam_hq_vision_model": _SAM,
    "sam2": _in_vision_encoder(_SAM2),
    "sam2_vision_model": _SAM2,
    "sam2_hiera_det_model": _SAM2,
    "sam3": _in_vision_encoder(_SAM3),
    "sam3_vision_model": _SAM3,
    "sam3_vit_model": _SAM3,
    "vit": _VISION_TRANSFORMER,
    "deit": _VISION_TRANSFORMER,
    "dinov2": _VISION_TRANSFORMER,
    "dinov2_with_registers": _VISION_TRANSFORMER,
    "dinov3_vit": _VISION_TRANSFORMER,
    "clip": _ENCODER_LAYERS,
    "clip_text_model": _ENCODER_LAYERS,
    "clip_vision_model": _ENCODER_LAYERS,
    "siglip": _ENCODER_LAYERS,
    "siglip_text_model": _ENCODER_LAYERS,
    "siglip_vision_model": _ENCODER_LAYERS,
    "siglip2": _ENCODER_LAYERS,
}


def default_by_class(model: nn.Module) -> str | None:
    """The default targets of a model without a transformers config.

    It knows the image encoder of the official ``segment_anything`` package, its subclasses, and its copies in MedSAM,
    SAM-HQ, MobileSAM and others. It also knows models with such an ``image_encoder``, as ``Sam``.

    Returns:
        A regular expression for module names, or None for an unknown model.
    """
    encoders = (model, getattr(model, "image_encoder", None))
    return _OFFICIAL_SAM if any(map(_is_official_encoder, encoders)) else None


def _is_official_encoder(module: object) -> bool:
    """Compares names of classes and modules, because each copy has its own classes and may not be installed."""
    return any(
        one.__name__ == "ImageEncoderViT" and f".{one.__module__}".endswith(".modeling.image_encoder")
        for one in type(module).__mro__
    )
