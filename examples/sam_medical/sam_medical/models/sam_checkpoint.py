"""Loads checkpoints of the official ``segment-anything`` package into transformers' SAM modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from sam_medical.common.errors import UserError, first_line
from svdtune.sam_names import rename_tensor

# The official mask decoder uses torch's default. The default of transformers' configuration is 1e-6.
DECODER_NORM_EPS = 1e-5

GRID_ENCODING = "prompt_encoder.shared_embedding.positional_embedding"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the state dict of a ``.pth`` file, at the top level or under ``model`` or ``state_dict``.

    Raises:
        UserError: if the file cannot be read, or contains no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a checkpoint that torch can read ({reason}); download it again.") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path} holds no state dict; give a segment-anything checkpoint such as sam_vit_b_01ec64.pth."
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors to transformers' names.

    Raises:
        ValueError: if SAM has no tensor of that name.
    """
    return {rename_tensor(name, "transformers"): tensor for name, tensor in weights.items()}


def sam_model_from_checkpoint(path: Path) -> SamModel:
    """Loads a `SamModel` from a checkpoint. The architecture follows from the shapes of the tensors.

    Raises:
        UserError: if the file is not a checkpoint of SAM with a plain ViT encoder (ViT-B, L or H, at any size).
    """
    weights = read_checkpoint(path)
    if "image_encoder.pos_embed" not in weights:
        raise UserError(
            f"{path} is not a segment-anything checkpoint: it has no image_encoder.pos_embed. "
            "Give sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth or a similar file."
        )
    try:
        model = SamModel(architecture_of(weights))
        converted = convert(weights)
        converted["shared_image_embedding.positional_embedding"] = converted[GRID_ENCODING]
    except Exception as error:  # the type of error depends on the missing tensor
        raise UserError(
            f"{path} is incomplete, or of another architecture ({first_line(error)}); download it again."
        ) from error
    load_exactly(model, converted, path)
    return model


def architecture_of(weights: Mapping[str, Tensor]) -> SamConfig:
    """Returns the configuration of the `SamModel` that is equivalent to the official model with these weights."""
    _, grid, _, width = weights["image_encoder.pos_embed"].shape
    patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = len({name.split(".")[2] for name in weights if name.startswith("image_encoder.blocks.")})
    table_lengths = [len(weights[f"image_encoder.blocks.{i}.attn.rel_pos_h"]) for i in range(depth)]
    global_length = 2 * grid - 1
    global_layers = [i for i, length in enumerate(table_lengths) if length == global_length]
    window_lengths = [length for length in table_lengths if length != global_length]
    head_width = weights["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    vision = SamVisionConfig(
        hidden_size=width,
        output_channels=weights["image_encoder.neck.0.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=width // head_width,
        image_size=grid * patch,
        patch_size=patch,
        window_size=(window_lengths[0] + 1) // 2 if window_lengths else 0,
        global_attn_indexes=global_layers,
        mlp_dim=weights["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
    )
    return SamConfig(
        vision_config=vision,
        prompt_encoder_config=SamPromptEncoderConfig(image_size=grid * patch, patch_size=patch),
        mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=DECODER_NORM_EPS),
    )


def load_exactly(module: torch.nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Loads a state dict whose names and shapes must match exactly. Otherwise raises a `UserError`."""
    expected = module.state_dict()
    wrong = [name for name in sorted(weights.keys() ^ expected.keys())]
    wrong += [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    if wrong:
        raise UserError(
            f"{source} is of another architecture: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"first of them {wrong[0]}."
        )
    module.load_state_dict(weights)
