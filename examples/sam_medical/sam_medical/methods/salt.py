"""SALT (arXiv:2503.16055): scale and shift of the leading singular values, and low rank beside them."""

from __future__ import annotations

import math
import re
from typing import Any, cast

from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sam_medical.methods.method import Method
from sam_medical.methods.s_sam import PARTS
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.models.backbone import Backbone
from svdtune import SVDScaleShiftConfig

RANK = 0.25
LORA_RANK = 4


class LowRankBeside(nn.Module):
    """A linear layer or convolution, and LoRA's two matrices beside it; zero at first.

    PEFT's LoRA cannot be used here, since PEFT puts no adapter into the layer of another one.
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


def insert_salt(model: Backbone, target_modules: str) -> None:
    """Scales and shifts the leading singular values of each layer, and adds a low-rank pair beside it.

    The pair is that of an ordinary LoRA on the same layer, as a note in the published code says.
    """
    inject_adapter_in_model(SVDScaleShiftConfig(target_modules=target_modules, rank=RANK), model)
    for name, module in list(model.named_modules()):
        if re.fullmatch(target_modules, name):
            wrapped = LowRankBeside(module, LORA_RANK)
            wrapped.up.requires_grad_(True)
            wrapped.down.requires_grad_(True)
            model.set_submodule(name, wrapped)


SALT = Method(
    "SALT",
    "SALT (arXiv:2503.16055)",
    departs="a quarter of the singular values and rank 4; norms, positions and text affine layer as S-SAM's",
    tuner=InPlaceTuner(insert_salt, at_targets=True, parts=PARTS),
    learning_rate=2e-3,
)
