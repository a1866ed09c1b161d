"""What some methods put into SAM that PEFT has no configuration for.

Each function changes a `PromptedSam` in place, and leaves what it has put in as all that is trained.
"""

from __future__ import annotations

import math
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamMaskDecoder

from sam_medical.models.lite_medsam import WindowAttention
from sam_medical.models.prompted_sam import PromptedSam
from svdtune import SVDScaleShiftConfig

SAMED_RANK = 4
BOTTLENECK = 0.25
BESIDE_MLP = 0.5
SALT_RANK = 0.25
SALT_LORA_RANK = 4


def insert_samed(model: PromptedSam, labels: int, target_modules: str) -> None:
    """SAMed (arXiv:2304.13785): low rank for query and value, and a mask of the decoder's own for each label."""
    model.mask_decoder = decoder_with_masks(model.mask_decoder, labels)
    model.a_mask_a_label = True
    # Two pairs of rank 4 a layer, one for the queries' rows and one for the values', are one of rank 8 whose second
    # matrix is zero elsewhere, and stays so.
    config = LoraConfig(r=2 * SAMED_RANK, lora_alpha=2 * SAMED_RANK, target_modules=r"image_encoder\..*\.qkv")
    inject_adapter_in_model(config, model)
    for name, module in model.named_modules():
        if name.endswith(".qkv"):
            attention = model.get_submodule(name.removesuffix(".qkv"))
            weight = cast(nn.Parameter, cast(nn.Module, module.lora_B)["default"].weight)  # type: ignore[index]
            learns = torch.zeros_like(weight)
            queries, values = rows_of_queries_and_values(attention, len(weight))
            learns[queries, :SAMED_RANK] = 1
            learns[values, SAMED_RANK:] = 1
            weight.register_hook(lambda gradient, learns=learns: gradient * learns.to(gradient))
            weight.values_that_learn = int(learns.sum())  # type: ignore[attr-defined]


def rows_of_queries_and_values(attention: nn.Module, rows: int) -> tuple[Tensor, Tensor]:
    """The rows of an attention's ``qkv`` that make its queries, and those that make its values."""
    # LiteMedSAM's go head by head, SAM's all queries first.
    heads = attention.heads if isinstance(attention, WindowAttention) else 1
    queries, _, values = torch.arange(rows).unflatten(0, (heads, 3, -1)).unbind(1)  # type: ignore[no-untyped-call]
    return queries.flatten(), values.flatten()


def decoder_with_masks(decoder: SamMaskDecoder, masks: int) -> SamMaskDecoder:
    """A copy of a mask decoder that gives so many masks for one prompt, from the three that it has in turn."""
    config = type(decoder.config).from_dict({**decoder.config.to_dict(), "num_multimask_outputs": masks})
    config._attn_implementation = decoder.config._attn_implementation
    wider = SamMaskDecoder(config)
    source = [0, *(1 + k % (decoder.num_mask_tokens - 1) for k in range(masks))]
    old = decoder.state_dict()
    new = {}
    for name in wider.state_dict():
        if match := re.match(r"(output_hypernetworks_mlps\.)(\d+)(\..*)", name):
            new[name] = old[f"{match[1]}{source[int(match[2])]}{match[3]}"]
        elif name == "mask_tokens.weight" or name.startswith("iou_prediction_head.proj_out."):
            new[name] = old[name][source]
        else:
            new[name] = old[name]
    wider.load_state_dict(new)
    return wider.requires_grad_(False)


class Bottleneck(nn.Module):
    """Down to a quarter of the width, GELU, and up again; zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, round(BOTTLENECK * width))
        self.up = nn.Linear(round(BOTTLENECK * width), width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class BottleneckAfter(nn.Module):
    """A layer, and a bottleneck with a skip connection behind it."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.bottleneck = Bottleneck(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.bottleneck(y)


class BottleneckBeside(nn.Module):
    """A layer, and a bottleneck that sees the same input."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.bottleneck = Bottleneck(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + BESIDE_MLP * self.bottleneck(x)


def insert_bottlenecks(model: PromptedSam, labels: int, target_modules: str) -> None:
    """Medical SAM Adapter (arXiv:2304.12620), for images: bottlenecks behind each attention and beside each MLP.

    In the encoder behind its attention, in the decoder behind both attentions between tokens and image. Of the
    paper's two further parts one is for volumes, the other makes the decoder's bottlenecks from a click, of which
    there is none here.
    """
    patterns = {
        r"image_encoder\.layers\..*attn\.proj": BottleneckAfter,
        r"image_encoder\.layers\..*\.mlp": BottleneckBeside,
        r"mask_decoder\.transformer\.layers\.\d+\.cross_attn_\w+\.out_proj": BottleneckAfter,
        r"mask_decoder\.transformer\.layers\.\d+\.mlp": BottleneckBeside,
    }
    for pattern, wrapper in patterns.items():
        for name, module in list(model.named_modules()):
            if re.fullmatch(pattern, name):
                last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
                wrapped = wrapper(module, last.out_features)
                wrapped.bottleneck.requires_grad_(True)
                model.set_submodule(name, wrapped)


class LowRankBeside(nn.Module):
    """A linear layer or convolution, and LoRA's two matrices beside it; zero at first.

    PEFT puts no adapter into another one's layer, so that its LoRA cannot stand here.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.layer = layer
        base = cast(BaseTunerLayer, layer).get_base_layer()
        if isinstance(base, nn.Linear):
            self.down: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, base.out_features, bias=False)
        elif isinstance(base, nn.Conv2d) and base.groups == 1:
            same: dict[str, Any] = {name: getattr(base, name) for name in ("stride", "padding", "dilation")}
            self.down = nn.Conv2d(base.in_channels, rank, cast(Any, base.kernel_size), bias=False, **same)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            raise ValueError(f"SALT tunes linear layers and convolutions without groups, and no {base}.")
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def insert_salt(model: PromptedSam, labels: int, target_modules: str) -> None:
    """SALT (arXiv:2503.16055): scale and shift of the leading singular values, and low rank beside them.

    The low-rank matrices are those of an ordinary LoRA on the same layer, as a note in its published code has it.
    """
    inject_adapter_in_model(SVDScaleShiftConfig(target_modules=target_modules, rank=SALT_RANK), model)
    for name, module in list(model.named_modules()):
        if re.fullmatch(target_modules, name):
            wrapped = LowRankBeside(module, SALT_LORA_RANK)
            wrapped.up.requires_grad_(True)
            wrapped.down.requires_grad_(True)
            model.set_submodule(name, wrapped)
