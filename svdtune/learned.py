"""The vectors that an adapter learns for a layer, and the formats in which older adapters saved them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

# The version of adapter_config.json. Version 2 added `digests`; version 3 holds a = A - 1 under other names.
FORMAT_VERSION = 3
# A name before version 3: the layer's path, the vector, and in a model's own state dict the adapter's name.
_NAME_BEFORE = re.compile(r"(.*\.|)svd_scale_shift_(scale|shift)(\.[^.]+|)")


class LearnedVector(nn.Module):
    """A vector (g * rank,) in a module of its own, which is called to read it.

    Libraries act when a module is called: accelerate brings offloaded parameters back, FSDP gathers sharded ones.
    Libraries that copy an adapter look for names that end in ``.default.weight``, like LoRA's.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self) -> Tensor:
        return self.weight


class ToBeRead(Mapping[str, Tensor]):
    """The vectors of a layer's adapters in the paper's notation, by the adapters' names."""

    def __init__(self, vectors: nn.ModuleDict, as_in_paper: Callable[[Tensor], Tensor]) -> None:
        self._vectors, self._as_in_paper = vectors, as_in_paper

    def __getitem__(self, adapter_name: str) -> Tensor:
        return self._as_in_paper(self._vectors[adapter_name]())

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)


def stacked(vectors: nn.ModuleDict, adapter_names: Sequence[str], like: Tensor) -> Tensor:
    """The adapters' vectors, one per row, in the dtype of ``like`` or a wider one; zeros for adapters without one."""
    known = vectors._modules  # hundreds of look-ups in a ModuleDict would take as long as a product
    found = [known.get(name) for name in adapter_names]
    rows = [torch.zeros_like(like) if vector is None else vector() for vector in found]
    together = rows[0][None] if len(rows) == 1 else torch.stack(rows)
    return together if together.dtype == like.dtype else together.to(torch.promote_types(together.dtype, like.dtype))


def in_present_format(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors in the present format: under the present names, with a = A - 1 in place of A."""
    return dict(_in_present_format(key, tensor) for key, tensor in state.items())


def _in_present_format(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    before = _NAME_BEFORE.fullmatch(key)
    if before is None:
        return key, tensor
    path, vector, adapter_name = before.groups()
    if vector == "shift":
        return f"{path}svd_scale_shift_b{adapter_name}.weight", tensor
    if tensor.is_floating_point() and not tensor.is_meta:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) - 1  # exact for A between 1 / 2 and 2
    return f"{path}svd_scale_shift_a{adapter_name}.weight", tensor
