"""A batch whose samples each have an adapter of their own: ``model(..., adapter_names=[...])``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from svdtune.layer import BASE, SVDScaleShiftLayer


@contextmanager
def adapter_of_each_sample(model: nn.Module, adapter_names: list[str], num_beams: int = 1) -> Iterator[None]:
    """While open, the model's tuned layers apply to each sample of a batch the adapter named for it.

    Args:
        model: The model with the tuned layers.
        adapter_names: One adapter a sample; ``__base__`` for none.
        num_beams: How many rows the decoder sees for a sample, in a beam search.

    Raises:
        ValueError: in training mode, or if no layer has an adapter of one of the names.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, SVDScaleShiftLayer)]
    known = {BASE}.union(*(layer.rank for layer in layers))
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    encoder = cast(Any, model).get_encoder() if num_beams > 1 and hasattr(model, "get_encoder") else None
    # A beam search repeats the samples, but only once the encoder has seen them.
    in_encoder = set() if encoder is None or encoder is model else set(encoder.modules())
    names_of_beams = [name for name in adapter_names for _ in range(num_beams)]
    handles = [
        module.register_forward_pre_hook(
            _give_names(adapter_names if module in in_encoder else names_of_beams), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (SVDScaleShiftLayer, AuxiliaryTrainingWrapper))
    ]
    thread = threading.get_ident()
    for layer in layers:
        layer.threads_of_mixed_batches.add(thread)
    try:
        yield
    finally:
        for layer in layers:
            layer.threads_of_mixed_batches.discard(thread)
        for handle in handles:
            handle.remove()


def _give_names(adapter_names: list[str]):
    thread = threading.get_ident()

    def hook(module, args, kwargs):
        # Other threads may compute with the same model, with other names or with none.
        if threading.get_ident() != thread:
            return args, kwargs
        return args, {**kwargs, "adapter_names": adapter_names}

    return hook
