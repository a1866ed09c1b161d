"""How much of a trained change is lost by conversion to LoRA of rank r?

    python benchmarks/lora_conversion.py [--adapter folder] [--ranks 8 64]

PEFT's `convert_to_lora` keeps the r leading singular values of each layer's change W' - W. The error is the Frobenius
norm of the discarded part, relative to that of the change: over all linear layers, and in the best and worst layer.
The default is the example's adapter on GlaS; the example's README describes how to get its weights.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from sam_medical.adapters.adapter import load_adapter
from svdtune import SVDScaleShiftConfig, SVDScaleShiftModel

ADAPTER = Path(__file__).parents[1] / "examples" / "sam_medical" / "adapters" / "glas"
LAYER = SVDScaleShiftModel.tuner_layer_cls


@torch.no_grad()
def errors(model: nn.Module, rank: int) -> list[tuple[float, float]]:
    """Per linear layer: the norm of the lost part, and the norm of the change."""
    layers = [m for m in model.modules() if isinstance(m, LAYER) and isinstance(m.get_base_layer(), nn.Linear)]
    return [
        ((layer.get_delta_weight("default") - kept_by_lora(layer, rank)).norm().item(), size)
        for layer in layers
        if (size := layer.get_delta_weight("default").norm().item())
    ]


def kept_by_lora(layer: nn.Module, rank: int) -> Tensor:
    """The change of the weight after PEFT converts this layer."""
    base = nn.Sequential(copy.deepcopy(layer.get_base_layer()))
    model = peft.get_peft_model(base, SVDScaleShiftConfig(target_modules=["0"]))
    model.base_model.model[0] = layer
    config, state = peft.convert_to_lora(model, rank=rank)
    lora = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.get_base_layer())), config)
    peft.set_peft_model_state_dict(lora, state)
    return lora.base_model.model[0].get_delta_weight("default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    arguments = parser.parse_args()

    model, _ = load_adapter(arguments.adapter)
    print("| rank | error of the change, all layers | best | worst | layers |\n|---|---|---|---|---|")
    for rank in arguments.ranks:
        found = errors(model, rank)
        lost, size = (sum(norm**2 for norm in norms) ** 0.5 for norms in zip(*found, strict=True))
        each = sorted(one / of for one, of in found)
        print(f"| {rank} | {lost / size:.2f} | {each[0]:.2f} | {each[-1]:.2f} | {len(each)} |", flush=True)


if __name__ == "__main__":
    main()
