"""Access to parameters that accelerate keeps on the CPU or a disk until the layer is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def brought_back(module: nn.Module) -> Iterator[None]:
    """A context in which the module's own parameters are on its execution device."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.tensor([]))
