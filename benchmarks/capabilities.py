"""Which features of PEFT do seven methods support? (the table in the main README)

    PYTHONPATH=.venv/quantizers python benchmarks/capabilities.py    # where `make test` installs bitsandbytes

Each cell is the result of a test on a tiny model with trained (random) values: "yes" if the result is right, "no" if
the method raises an error or the result is wrong. `--why` prints the reason for each "no".
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import IA3Config, LoraConfig, OFTConfig, OSFConfig, PeftModel, PsoftConfig, VeraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from svdtune import SVDScaleShiftConfig, hotswap_adapter

warnings.filterwarnings("ignore")

# The minimal config of each method for a layer called "layer".
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "svdtune": (SVDScaleShiftConfig, {}),
    "LoRA": (LoraConfig, {"r": 4}),
    "IA3": (IA3Config, {"feedforward_modules": []}),
    "OFT": (OFTConfig, {"oft_block_size": 4}),
    "OSF": (OSFConfig, {"effective_rank": 2}),
    "PSOFT": (PsoftConfig, {"r": 4}),
    "VeRA": (VeraConfig, {"r": 4}),
}


class Net(nn.Module):
    """A layer to tune, of any kind, followed by a head."""

    def __init__(self, layer: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, width)
        self.attends = isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x)[0] if self.attends else self.layer(x)


class Deep(nn.Module):
    """An embedding followed by two layers to tune, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"layer": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block["layer"](x)
        return self.head(x)


class Experts(nn.Module):
    """Two experts in one parameter, (2, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight)


@dataclass
class Method:
    """A PEFT method to test."""

    config_class: type
    least: dict[str, Any]

    def config(self, **choices: Any) -> Any:
        return self.config_class(**{"target_modules": ["layer"], **self.least, **choices})

    def tuned(self, base: nn.Module | None = None, **choices: Any) -> PeftModel:
        """A model with trained values: every trainable parameter gets noise."""
        model = get_peft_model(Net(nn.Linear(8, 8)) if base is None else base, self.config(**choices))
        return trained(model).eval()


@torch.no_grad()
def trained(model: nn.Module, adapter_name: str = "default") -> Any:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or f".{adapter_name}" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def check(condition: Any, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=tolerance)


def tunes(make_layer: Callable[[], nn.Module], x: torch.Tensor, **choices: Any) -> Callable[[Method], None]:
    """A test that an adapter changes a kind of layer, and that merging gives the same output."""

    def trial(method: Method) -> None:
        base = Net(make_layer()).eval()
        expected = base(x)
        model = method.tuned(base, **choices)
        output = model(x)
        check(not close(output, expected, 1e-3), "the adapter changes nothing")
        check(close(model.merge_and_unload()(x), output), "the merged model differs")

    return trial


X = torch.randn(3, 8)
IMAGE = torch.randn(2, 8, 6, 6)


def several_active(method: Method) -> None:
    model = method.tuned()
    model.add_adapter("other", method.config())
    model.base_model.set_adapter(["default", "other"])
    trained(model, "other")
    both = model(X)
    model.merge_adapter()
    check(close(model(X), both), "merged and unmerged differ")


def unmerge_restores_every_bit(method: Method) -> None:
    base = Net(nn.Linear(8, 8)).bfloat16()
    weight = base.layer.weight.detach().clone()
    model = method.tuned(base)
    model.merge_adapter()
    check(not torch.equal(model.base_model.model.layer.get_base_layer().weight, weight), "merging changes nothing")
    model.unmerge_adapter()
    check(torch.equal(model.base_model.model.layer.get_base_layer().weight, weight), "the weight differs")


def disabling_gives_the_base(method: Method) -> None:
    base = Net(nn.Linear(8, 8))
    expected = base(X)
    model = method.tuned(base)
    with model.disable_adapter():
        check(torch.equal(model(X), expected), "the output differs in some bits")


def exact_sum(method: Method) -> None:
    model = method.tuned()
    model.add_adapter("other", method.config())
    model.base_model.set_adapter("other")
    trained(model, "other")
    # LoRA's exact sum is the concatenation, whose rank is the sum of the ranks.
    options = {"combination_type": "cat"} if method.config_class is LoraConfig else {}
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", **options)
    layer = model.base_model.model.layer
    expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
    check(close(layer.get_delta_weight("sum"), expected), "the sum is not the sum")


def mixed_batch(method: Method) -> None:
    model = method.tuned()
    model.add_adapter("other", method.config())
    model.base_model.set_adapter("other")
    trained(model, "other")
    expected = model(X)[1]
    model.base_model.set_adapter("default")
    mixed = model(X, adapter_names=["default", "other", "__base__"])
    check(close(mixed[1], expected), "the second sample has not its adapter")


def copied_by_name(method: Method) -> None:
    """Copies the adapter as trl's DPO, KTO and GRPO trainers do for their reference."""
    model = method.tuned()
    expected = model(X)
    model.add_adapter("ref", method.config())
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.base_model.set_adapter("ref")
    check(close(model(X), expected), "the reference is another adapter")


def weighted(method: Method) -> None:
    """Scales each layer as diffusers' `set_adapters([...], weights)` does."""
    base = Net(nn.Linear(8, 8)).eval()
    untuned = base(X)
    model = method.tuned(base)
    change = model(X) - untuned
    model.base_model.model.layer.set_scale("default", 0.5)
    check(close(model(X) - untuned, 0.5 * change), "the change is not half of it")


def hot_swap(method: Method) -> None:
    swap = hotswap_adapter if method.config_class is SVDScaleShiftConfig else pefts_hotswap_adapter
    base = Net(nn.Linear(8, 8))
    with tempfile.TemporaryDirectory() as folder:
        other = method.tuned(copy.deepcopy(base))
        other.save_pretrained(folder)
        model = method.tuned(copy.deepcopy(base))
        options = {} if swap is hotswap_adapter else {"torch_device": "cpu"}
        swap(model, folder, adapter_name="default", **options)
        check(close(model(X), other(X)), "the output is not the other adapter's")


def says_when_the_base_differs(method: Method) -> None:
    with tempfile.TemporaryDirectory() as folder:
        method.tuned().save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                PeftModel.from_pretrained(Net(nn.Linear(8, 8)), folder)
            except UserWarning:
                return
    raise AssertionError("no warning")


def quantised(bits: int) -> Callable[[Method], None]:
    def trial(method: Method) -> None:
        import bitsandbytes as bnb

        x = torch.randn(2, 64)
        if bits == 4:
            layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
            # On some CPUs, bitsandbytes packs a weight at its first evaluation, and all of PEFT then reads it wrongly.
            # svdtune prevents that, but other methods do not, so disable it for all.
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        base = Net(layer, 64)
        base.load_state_dict(Net(nn.Linear(64, 64), 64).state_dict())
        base = base.to("cpu")
        setattr(base, f"is_loaded_in_{bits}bit", True)  # transformers sets it, and LoRA reads it
        model = method.tuned(base)
        output = model(x)
        output.square().sum().backward()
        with model.disable_adapter():
            change = output - model(x)
        check(change.norm() > 0.1 * output.norm(), "the adapter changes nothing")
        model.merge_adapter()
        # Merging quantises the weight again. For NF4, that alone changes a small output by a tenth or more.
        check((model(x) - output).norm() < 0.35 * output.norm(), "merged and unmerged differ")

    return trial


def compiles(method: Method) -> None:
    model = method.tuned()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(close(compiled(X), model(X)), "compiled and eager differ")


def converts_to_lora(method: Method) -> None:
    if method.config_class is LoraConfig:
        return
    model = method.tuned()
    expected = model.base_model.model.layer.get_delta_weight("default")
    config, state = peft.convert_to_lora(model, rank=8)
    lora = get_peft_model(Net(nn.Linear(8, 8)), config)
    peft.set_peft_model_state_dict(lora, state)
    check(close(lora.base_model.model.layer.get_delta_weight("default"), expected, 1e-3), "another change")


def chooses(**choices: Any) -> Callable[[Method], None]:
    """A test that the config accepts a setting, and that it changes which values are trained."""

    def learned(model: nn.Module) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def trial(method: Method) -> None:
        targets = {"target_modules": ["layer", "head"]}
        model = method.tuned(Deep(), **{**targets, **choices})
        model(torch.arange(9))
        check(learned(model) != learned(method.tuned(Deep(), **targets)), "the choice changes nothing")

    return trial


TRIALS: dict[str, Callable[[Method], None]] = {
    "`nn.Linear`": tunes(lambda: nn.Linear(8, 8), X),
    "transformers' `Conv1D`": tunes(lambda: Conv1D(8, 8), X),
    "`nn.Conv1d`": tunes(lambda: nn.Conv1d(8, 8, 3), torch.randn(2, 8, 6)),
    "`nn.Conv2d`": tunes(lambda: nn.Conv2d(8, 8, 3), IMAGE),
    "`nn.Conv2d`, groups": tunes(lambda: nn.Conv2d(8, 8, 3, groups=2), IMAGE),
    "`nn.Conv3d`": tunes(lambda: nn.Conv3d(8, 8, 2), torch.randn(2, 8, 3, 3, 3)),
    "`nn.Embedding`": tunes(lambda: nn.Embedding(9, 8), torch.arange(9)),
    "`nn.MultiheadAttention`": tunes(lambda: nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)),
    "`target_parameters` (experts)": tunes(Experts, X, target_modules=[], target_parameters=["layer.weight"]),
    "bitsandbytes 4 bit": quantised(4),
    "bitsandbytes 8 bit": quantised(8),
    "`exclude_modules`": chooses(exclude_modules=["head"]),
    "`layers_to_transform`": chooses(layers_to_transform=[1], layers_pattern="layers"),
    "`rank_pattern`": chooses(rank_pattern={"layer": 3}),
    "`modules_to_save`": chooses(modules_to_save=["embedding"]),
    "`trainable_token_indices`": chooses(trainable_token_indices={"embedding": [1, 2]}),
    "`bias`": chooses(bias="all"),
    "several active at once": several_active,
    "a mixed batch, `adapter_names`": mixed_batch,
    "`add_weighted_adapter`, exact": exact_sum,
    "hot-swap": hot_swap,
    "trl's references, copied by name": copied_by_name,
    "diffusers' `set_adapters(..., weights)`": weighted,
    "`disable_adapter` to the last bit": disabling_gives_the_base,
    "`unmerge` restores every bit (bfloat16)": unmerge_restores_every_bit,
    "`torch.compile(fullgraph=True)`": compiles,
    "converts to LoRA": converts_to_lora,
    "says when the base differs": says_when_the_base_differs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--why", action="store_true", help="print what came of each no")
    arguments = parser.parse_args()

    reasons = []
    print(f"| | {' | '.join(METHODS)} |")
    print(f"|---|{'---|' * len(METHODS)}")
    for capability, trial in TRIALS.items():
        cells = []
        for name, method in METHODS.items():
            torch.manual_seed(0)
            try:
                trial(Method(*method))
                cells.append("yes")
            except Exception as error:  # any error counts as a "no"
                cells.append("no")
                reasons.append(f"{name}, {capability}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        print(f"| {capability} | {' | '.join(cells)} |")
    if arguments.why:
        print("", *reasons, sep="\n")


if __name__ == "__main__":
    main()
