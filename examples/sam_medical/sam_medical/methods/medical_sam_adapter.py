"""Medical SAM Adapter (arXiv:2304.12620): bottlenecks behind attentions and beside MLPs."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from sam_medical.methods.method import Method
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.models.backbone import Backbone

BOTTLENECK = 0.25
BESIDE_MLP = 0.5


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


def insert_bottlenecks(model: Backbone, target_modules: str) -> None:
    """Puts bottlenecks behind attentions and beside MLPs, in the encoder and in the decoder.

    In the decoder they stand behind both attentions between tokens and image. The paper has two further parts: one is
    for volumes, and one computes the decoder's bottlenecks from a click, of which there is none here.
    """
    places = model.patterns
    for pattern, wrapper in (
        (places.encoder_attention, BottleneckAfter),
        (places.encoder_mlp, BottleneckBeside),
        (places.decoder_attention, BottleneckAfter),
        (places.decoder_mlp, BottleneckBeside),
    ):
        for name, module in list(model.named_modules()):
            if re.fullmatch(pattern, name):
                last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
                wrapped = wrapper(module, last.out_features)
                wrapped.bottleneck.requires_grad_(True)
                model.set_submodule(name, wrapped)


MEDICAL_SAM_ADAPTER = Method(
    "Medical SAM Adapter",
    "Medical SAM Adapter (arXiv:2304.12620)",
    tuner=InPlaceTuner(insert_bottlenecks, parts=("prompts",)),
    departs="prompted with the label's name; no click to make the decoder's bottlenecks from, and no volumes",
    learning_rate=1e-3,
)
