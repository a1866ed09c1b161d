"""Names of SAM's modules in the official ``segment_anything`` package and in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Naming = Literal["segment_anything", "transformers"]
_Renaming = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

# Pairs of the official name and transformers' name, of modules and of tensors other than weights and biases. The
# character # means a number.
_ENCODER = (
    ("", ""),
    (".pos_embed", ".pos_embed"),
    (".patch_embed", ".patch_embed"),
    (".patch_embed.proj", ".patch_embed.projection"),
    (".blocks", ".layers"),
    (".blocks.#", ".layers.#"),
    (".blocks.#.norm#", ".layers.#.layer_norm#"),
    (".blocks.#.attn", ".layers.#.attn"),
    (".blocks.#.attn.qkv", ".layers.#.attn.qkv"),
    (".blocks.#.attn.proj", ".layers.#.attn.proj"),
    (".blocks.#.mlp", ".layers.#.mlp"),
    (".blocks.#.mlp.lin#", ".layers.#.mlp.lin#"),
    (".neck", ".neck"),
    (".neck.0", ".neck.conv1"),
    (".neck.1", ".neck.layer_norm1"),
    (".neck.2", ".neck.conv2"),
    (".neck.3", ".neck.layer_norm2"),
)
_PROMPT_ENCODER = (
    ("", ""),
    (".pe_layer", ".shared_embedding"),
    (".pe_layer.positional_encoding_gaussian_matrix", ".shared_embedding.positional_embedding"),
    (".point_embeddings", ".point_embed"),
    (".point_embeddings.#", ".point_embed.#"),
    (".not_a_point_embed", ".not_a_point_embed"),
    (".no_mask_embed", ".no_mask_embed"),
    (".mask_downscaling", ".mask_embed"),
    (".mask_downscaling.0", ".mask_embed.conv1"),
    (".mask_downscaling.1", ".mask_embed.layer_norm1"),
    (".mask_downscaling.3", ".mask_embed.conv2"),
    (".mask_downscaling.4", ".mask_embed.layer_norm2"),
    (".mask_downscaling.6", ".mask_embed.conv3"),
)
_ATTENTIONS = (
    ".transformer.layers.#.self_attn",
    ".transformer.layers.#.cross_attn_token_to_image",
    ".transformer.layers.#.cross_attn_image_to_token",
    ".transformer.final_attn_token_to_image",
)
_HEADS = (".output_hypernetworks_mlps.#", ".iou_prediction_head")
_DECODER = (
    ("", ""),
    (".iou_token", ".iou_token"),
    (".mask_tokens", ".mask_tokens"),
    (".transformer", ".transformer"),
    (".transformer.layers", ".transformer.layers"),
    (".transformer.layers.#", ".transformer.layers.#"),
    (".transformer.layers.#.norm#", ".transformer.layers.#.layer_norm#"),
    (".transformer.layers.#.mlp", ".transformer.layers.#.mlp"),
    (".transformer.layers.#.mlp.lin#", ".transformer.layers.#.mlp.lin#"),
    (".transformer.norm_final_attn", ".transformer.layer_norm_final_attn"),
    *((attention, attention) for attention in _ATTENTIONS),
    *((f"{attention}.{x}_proj",) * 2 for attention in _ATTENTIONS for x in ("q", "k", "v", "out")),
    (".output_upscaling.0", ".upscale_conv1"),
    (".output_upscaling.1", ".upscale_layer_norm"),
    (".output_upscaling.3", ".upscale_conv2"),
    (".output_hypernetworks_mlps", ".output_hypernetworks_mlps"),
    *((head, head) for head in _HEADS),
    *((f"{head}.layers.0", f"{head}.proj_in") for head in _HEADS),
    *((f"{head}.layers.1", f"{head}.layers.0") for head in _HEADS),
    *((f"{head}.layers.2", f"{head}.proj_out") for head in _HEADS),
)
_ROWS = [
    *((f"image_encoder{official}", f"vision_encoder{other}") for official, other in _ENCODER),
    *((f"prompt_encoder{official}", f"prompt_encoder{other}") for official, other in _PROMPT_ENCODER),
    *((f"mask_decoder{official}", f"mask_decoder{other}") for official, other in _DECODER),
]


def _renaming(old: str, new: str) -> _Renaming:
    pattern = re.compile(re.escape(old).replace(r"\#", r"(\d+)"))
    return pattern, lambda match: new.replace("#", "{}").format(*match.groups())


_RENAMINGS: dict[str, list[_Renaming]] = {
    "transformers": [_renaming(official, other) for official, other in _ROWS],
    "segment_anything": [_renaming(other, official) for official, other in _ROWS],
}


def rename_module(name: str, to: Naming) -> str:
    """Translates the name of a module of SAM, or of its image encoder alone, to another package.

    Raises:
        ValueError: if SAM has no such module, or if the other package does not have it.
    """
    renamed = _renamed(name, to) or _renamed_in_encoder(name, to)
    if renamed is None:
        raise ValueError(f"`{name}` is not a module that SAM has in both packages, segment_anything and transformers.")
    return renamed


def rename_tensor(name: str, to: Naming) -> str:
    """Translates the name of a parameter or buffer of SAM, or of its image encoder alone, to another package.

    Raises:
        ValueError: if SAM has no such tensor.
    """
    renamed = _renamed(name, to) or _renamed_in_encoder(name, to)
    if renamed is None:
        module, _, tensor = name.rpartition(".")
        renamed = f"{rename_module(module, to)}.{tensor}"
    return renamed


def _renamed(name: str, to: Naming) -> str | None:
    matches = ((pattern.fullmatch(name), renamed) for pattern, renamed in _RENAMINGS[to])
    return next((renamed(match) for match, renamed in matches if match), None)


def _renamed_in_encoder(name: str, to: Naming) -> str | None:
    here, there = "image_encoder", "vision_encoder"
    if to == "segment_anything":
        here, there = there, here
    renamed = _renamed(f"{here}.{name}", to)
    return None if renamed is None else renamed.removeprefix(f"{there}.")
