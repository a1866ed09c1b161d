"""Which modules are tuned when the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

_ENCODER_LAYERS = r".*layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_VISION_TRANSFORMER = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
    # transformers 4's names of the same layers
    *("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
]
_SAM = ["qkv", "proj", "lin1", "lin2"]
_SAM2 = ["qkv", "proj", "proj_in", "proj_out"]
# In the official segment_anything package, where the encoder may stand alone.
_OFFICIAL_SAM = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))"
_SAM3 = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def _in_vision_encoder(names: list[str]) -> str:
    """A regular expression for layers of the image encoder, which leaves prompt encoder and mask decoder alone."""
    return rf"(.*\.)?vision_encoder\..*\.({'|'.join(names)})"


def _as_written(names: Sequence[str]) -> list[str] | str:
    """PEFT's table holds lists of names and regular expressions."""
    return names if isinstance(names, str) else list(names)


# PEFT's own choice for LoRA where it has one; for models that see, the linear layers of all encoder blocks.
DEFAULT_TARGET_MODULES: dict[str, list[str] | str] = {
    **{kind: _as_written(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()},
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
    """The default targets of models that have no transformers' config, as a regular expression; None if none is known.

    They are known for the encoder of the official ``segment_anything`` package, of its copies in MedSAM, SAM-HQ,
    MobileSAM and others, and of subclasses; and for whatever has one as its ``image_encoder``, as ``Sam`` does.
    """
    encoders = (model, getattr(model, "image_encoder", None))
    return _OFFICIAL_SAM if any(map(_is_official_encoder, encoders)) else None


def _is_official_encoder(module: object) -> bool:
    """By name, since each copy has classes of its own, and importing one must not be needed to tell."""
    return any(
        one.__name__ == "ImageEncoderViT" and f".{one.__module__}".endswith(".modeling.image_encoder")
        for one in type(module).__mro__
    )
