"""SAMed (arXiv:2304.13785): low rank for query and value, and a mask of the decoder's own for each label."""

from __future__ import annotations

import re
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamMaskDecoder

from sam_medical.methods.method import Method
from sam_medical.models.lite_medsam import WindowAttention
from sam_medical.models.prompted_sam import PromptedSam

RANK = 4


def insert_samed(model: PromptedSam, labels: int, target_modules: str) -> None:
    """SAMed (arXiv:2304.13785): low rank for query and value, and a mask of the decoder's own for each label."""
    model.mask_decoder = decoder_with_masks(model.mask_decoder, labels)
    model.a_mask_a_label = True
    # Two pairs of rank 4 a layer, one for the queries' rows and one for the values', are one of rank 8 whose second
    # matrix is zero elsewhere, and stays so.
    config = LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=r"image_encoder\..*\.qkv")
    inject_adapter_in_model(config, model)
    for name, module in model.named_modules():
        if name.endswith(".qkv"):
            attention = model.get_submodule(name.removesuffix(".qkv"))
            weight = cast(nn.Parameter, cast(nn.Module, module.lora_B)["default"].weight)  # type: ignore[index]
            learns = torch.zeros_like(weight)
            queries, values = rows_of_queries_and_values(attention, len(weight))
            learns[queries, :RANK] = 1
            learns[values, RANK:] = 1
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


SAMED = Method(
    "SAMed",
    "SAMed (arXiv:2304.13785)",
    departs="no softmax over labels and background, since labels may overlap",
    prompts="none",
    insert=insert_samed,
    trained=("mask decoder", "default prompt"),
    learning_rate=2e-3,
)
