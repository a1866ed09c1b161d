"""Mixed batches, with one adapter per sample: ``model(..., adapter_names=[...])``.

`SVDScaleShiftLayer.forward` computes a mixed batch; this module passes the names to the layers.
"""

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
    """While open, the model's tuned layers apply a different adapter to each sample of a batch.

    Args:
        model: The model with the tuned layers.
        adapter_names: One adapter per sample; ``__base__`` for none.
        num_beams: How many rows per sample the decoder gets in a beam search.

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
    # A beam search repeats the samples after the encoder.
    in_encoder = set() if encoder is None or encoder is model else set(encoder.modules())
    names_of_beams = [name for name in adapter_names for _ in range(num_beams)]
    handles = [
        module.register_forward_pre_hook(
            _give_names(adapter_names if module in in_encoder else names_of_beams), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (SVDScaleShiftLayer, AuxiliaryTrainingWrapper))
    ]
    # A layer whose weight is read, instead of being called, refuses mixed batches. It knows them by their thread.
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
    """A forward pre-hook that adds ``adapter_names`` to the keyword arguments."""
    thread = threading.get_ident()

    def hook(module, args, kwargs):
        # Other threads may use the same model at the same time, with other names or none.
        if threading.get_ident() != thread:
            return args, kwargs
        return args, {**kwargs, "adapter_names": adapter_names}

    return hook
