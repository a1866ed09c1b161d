"""Random sequences of what people do with adapters, against the paper's formula in float64 at every forward pass."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from soak.outcome import Outcome, until
from svdtune import SVDScaleShiftConfig, hotswap_adapter

STEPS = 40
TARGETS = ["0", "2"]
TOLERANCE = 2e-5


class Sequence:
    """A tuned model and, beside it, what it should compute: plain values of each adapter, by layer.

    The values of an adapter are (A, B) of each target. Several active adapters add their changes of the weight.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        sizes = [self.random.choice([6, 9, 16]) for _ in range(3)]
        self.base = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]))
        rank = self.random.choice([None, None, 3, 0.5])
        self.choices = {"target_modules": TARGETS, "rank": rank, "one_sided": self.random.random() < 0.3}
        self.model = get_peft_model(copy.deepcopy(self.base), SVDScaleShiftConfig(**self.choices))
        self.adapters: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.active, self.merged, self.disabled = ["default"], [], False
        self.set_values("default")

    def layer(self, target: str) -> nn.Module:
        return self.model.base_model.model[int(target)]

    def set_values(self, name: str) -> None:
        values = {}
        for target in TARGETS:
            layer = self.layer(target)
            size = layer.rank[name]
            pair = (1 + 0.5 * torch.randn(size), 0.2 * torch.randn(size))
            layer.svd_scale_shift_a[name].weight.data.copy_(pair[0] - 1)
            layer.svd_scale_shift_b[name].weight.data.copy_(pair[1])
            values[target] = pair
        self.adapters[name] = values

    def expected(self, x: Tensor, adapters: list[str]) -> Tensor:
        x = x.double()
        for position, module in enumerate(self.base):
            if not isinstance(module, nn.Linear):
                x = module(x)
                continue
            weight = module.weight.detach().double()
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            change = torch.zeros_like(values)
            for name in adapters:
                scale, shift = self.adapters[name][str(position)]
                leading = values[: len(scale)]
                change[: len(scale)] += (scale.double() * leading + shift.double()).relu() - leading
            x = x @ (weight + left @ torch.diag(change) @ right).T + module.bias.detach().double()
        return x

    def in_use(self) -> list[str]:
        return [] if self.disabled else (self.merged or self.active)

    # What is done, each a method that `step` may choose.

    def train_values(self) -> None:
        if not self.merged:
            self.set_values(self.random.choice(list(self.adapters)))

    def add(self) -> None:
        if len(self.adapters) < 4 and not self.merged:
            name = f"a{self.random.randrange(10**6)}"
            self.model.add_adapter(name, SVDScaleShiftConfig(**self.choices))
            self.set_values(name)

    def delete(self) -> None:
        # PeftModel keeps a name of its own, which it looks up at every forward pass.
        removable = [name for name in self.adapters if name not in (*self.active, self.model.active_adapter)]
        if removable and not self.merged:
            name = self.random.choice(removable)
            self.model.delete_adapter(name)
            del self.adapters[name]

    def activate(self) -> None:
        if not self.merged:
            names = self.random.sample(list(self.adapters), self.random.randint(1, len(self.adapters)))
            self.model.base_model.set_adapter(names)
            self.active = names

    def merge(self) -> None:
        if not self.merged and not self.disabled:
            self.model.merge_adapter()
            self.merged = list(self.active)

    def unmerge(self) -> None:
        if self.merged:
            self.model.unmerge_adapter()
            self.merged = []

    def toggle(self) -> None:
        if not self.merged:
            self.disabled = not self.disabled
            layers = self.model.base_model
            layers.disable_adapter_layers() if self.disabled else layers.enable_adapter_layers()

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def pickle(self) -> None:
        if not self.merged:
            self.model = pickle.loads(pickle.dumps(self.model))

    def save_and_load(self) -> None:
        if self.merged or self.disabled or len(self.active) != 1:
            return
        name = self.active[0]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            where = folder if name == "default" else str(Path(folder, name))
            self.model = PeftModel.from_pretrained(copy.deepcopy(self.base), where, is_trainable=True, strict=True)
        self.adapters = {"default": self.adapters[name]}
        self.active = ["default"]

    def hotswap(self) -> None:
        if self.merged or len(self.adapters) < 2:
            return
        source, target = self.random.sample(list(self.adapters), 2)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[source])
            where = folder if source == "default" else str(Path(folder, source))
            hotswap_adapter(self.model, where, adapter_name=target)
        self.adapters[target] = self.adapters[source]

    def reload_base(self) -> None:
        """Another base weight, through the model's own state dict."""
        if self.merged:
            return
        state = self.model.state_dict()
        for target in TARGETS:
            key = f"base_model.model.{target}.base_layer.weight"
            state[key] = torch.randn_like(state[key]) * 0.5
            self.base[int(target)].weight.data.copy_(state[key])
        self.model.load_state_dict(state)

    def step(self) -> str:
        deeds: list[Callable[[], None]] = [
            *(self.train_values, self.add, self.delete, self.activate, self.merge, self.unmerge, self.toggle),
            *(self.copy, self.pickle, self.save_and_load, self.hotswap, self.reload_base),
        ]
        deed = self.random.choice(deeds)
        deed()
        return deed.__name__

    def error(self) -> float:
        """Of a forward pass, relative to the float64 reference; sometimes of a mixed batch."""
        x = torch.randn(5, self.base[0].in_features)
        if not self.merged and not self.disabled and self.random.random() < 0.3:
            names = [self.random.choice([*self.adapters, "__base__"]) for _ in x]
            expected = torch.cat(
                [
                    self.expected(row[None], [] if name == "__base__" else [name])
                    for row, name in zip(x, names, strict=True)
                ]
            )
            actual = self.model.eval()(x, adapter_names=names)
        else:
            expected, actual = self.expected(x, self.in_use()), self.model(x)
        return ((actual.double() - expected).norm() / expected.norm()).item()


def run(seconds: float, seed: int) -> Outcome:
    outcome, worst = Outcome("random sequences, steps"), 0.0
    for number in until(seconds):
        sequence, done = Sequence(1000 * seed + number), []
        for _ in range(STEPS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done.append(sequence.step())
                error = sequence.error()
            worst = max(worst, error)
            if not error <= TOLERANCE:
                outcome.fail(f"seed {1000 * seed + number}: off by {error:.2g} after {', '.join(done)}")
                break
            outcome.add("as in float64")
    outcome.remark = f"largest relative error {worst:.1e}"
    return outcome
