"""SAMed (arXiv:2304.13785): low rank for queries and values, and one of the decoder's masks per label."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sam_medical.methods.method import Method, PromptedBackbone
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.models import prompts
from sam_medical.models.backbone import Backbone

RANK = 4


def insert_low_rank(model: Backbone, target_modules: str) -> None:
    """Gives queries and values a low-rank change of their own, and keys none."""
    rows = model.query_and_value_rows()
    # Two pairs of rank 4 per layer, one for the rows of the queries and one for those of the values, are one pair of
    # rank 8 whose second matrix is held at zero elsewhere.
    config = LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=list(rows))
    inject_adapter_in_model(config, model)
    for name, (queries, values) in rows.items():
        matrices = cast(nn.ModuleDict, model.get_submodule(f"{name}.lora_B"))
        weight = cast(nn.Parameter, matrices["default"].weight)
        learns = torch.zeros_like(weight)
        learns[queries, :RANK] = 1
        learns[values, RANK:] = 1
        weight.register_hook(lambda grad, learns=learns: grad * learns.to(grad))
        weight.values_that_learn = int(learns.sum())  # type: ignore[attr-defined]


SAMED = Method(
    "SAMed",
    "SAMed (arXiv:2304.13785)",
    model=PromptedBackbone(prompts.NOTHING, mask_per_label=True),
    tuner=InPlaceTuner(insert_low_rank, parts=("mask decoder", "default prompt")),
    departs="no softmax over labels and background, since labels may overlap",
    learning_rate=2e-3,
)
