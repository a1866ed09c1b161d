"""How much memory do the backward pass and the singular vectors need, and how large is an adapter file?

    python benchmarks/memory.py [--quick] [--device cuda --dtype bfloat16]

The models are SAM's ViT-B encoder at 256 px, batch 8, with all linear layers of its blocks tuned, and one of its MLP
blocks alone. The script counts the tensors that autograd keeps for the backward pass, except parameters and singular
vectors. On a GPU, it also reports the allocator's peak over a whole training step.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from harness import Claim, Options, Result, bytes_kept, peak_bytes, run
from subjects import (
    FULL,
    PUBLISHED,
    QUICK_BLOCKS,
    Output,
    Subject,
    held_tensors,
    sam_encoder,
    trained_values,
    training_step,
    tuned,
    tuned_layers,
)

MIB = 2**20
METHODS = ["LoRA r=8", "svdtune", "svdtune, one-sided", "svdtune, rank=64", "LoRA r=64", FULL, PUBLISHED]


def mlp_block(options: Options, rows: int = 2048) -> Subject:
    """The MLP of one encoder block, with the encoder's number of rows at 256 px and batch 8."""
    block = sam_encoder(options, blocks=1).model.model.vision_encoder.layers[0].mlp
    return Subject("an MLP block alone", Output(block), ["lin1", "lin2"], options.to_device(torch.randn(rows, 768)))


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for the backward pass. The input has a gradient, as after other tuned layers."""
    x = x.detach().requires_grad_()
    return bytes_kept(lambda: model(x), held_tensors(model))


def vectors_share(model: nn.Module) -> float:
    """The bytes of the singular vectors, relative to the bytes of their weights."""
    layers = tuned_layers(model)
    held = sum(vectors.nbytes for layer in layers for vectors in layer.spectrum.held_vectors)
    return held / sum(layer.get_base_layer().weight.nbytes for layer in layers)


def file_bytes(model: nn.Module) -> int:
    assert isinstance(model, PeftModel)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.path.getsize(Path(folder) / "adapter_model.safetensors")


def costs(subjects: dict[str, Subject], method: str, on_gpu: bool) -> dict[str, Any]:
    """Costs of a method: bytes kept, peak bytes of a step, bytes of the file, share of the vectors, trained values."""
    models = {name: tuned(subject, method) for name, subject in subjects.items()}
    encoder = models["encoder"]
    found = {
        "kept": {name: kept(models[name], subject.x) for name, subject in subjects.items()},
        "peak": peak_bytes(training_step(encoder, subjects["encoder"].x)) if on_gpu else None,
        "vectors": vectors_share(encoder) if tuned_layers(encoder) else None,
        "file": file_bytes(encoder) if isinstance(encoder, PeftModel) else None,
        "trained": trained_values(encoder),
    }
    del models, encoder
    gc.collect()  # a PEFT model has reference cycles
    return found


def measure(options: Options) -> Result:
    result = Result("memory")
    encoder = sam_encoder(options, blocks=QUICK_BLOCKS if options.quick else 12)
    subjects = {"encoder": encoder, "MLP": mlp_block(options)}
    found = {method: costs(subjects, method, options.device == "cuda") for method in METHODS}
    rows = []
    for method, taken in found.items():
        sizes = [taken["kept"]["encoder"], taken["kept"]["MLP"], taken["peak"]]
        share, size = taken["vectors"], taken["file"]
        rows.append(
            [
                method,
                f"{taken['trained']:,}",
                *("" if number is None else f"{number / MIB:.0f}" for number in sizes),
                "" if share is None else f"{share:.2f}",
                "" if size is None else f"{size / 1000:.0f}",
            ]
        )
    columns = ["", "trained values", "kept, MiB", "kept by an MLP block, MiB", "peak of a step, MiB"]
    columns += ["vectors, times the tuned weights", "adapter, kB"]
    result.add_table(encoder.name, columns, rows)
    lora = found["LoRA r=8"]
    for name, what, reach in (("encoder", "the encoder", 0.87), ("MLP", "an MLP block alone", 0.65)):
        ratio = found["svdtune"]["kept"][name] / lora["kept"][name]
        result.claims.append(Claim(f"bytes kept for backward, {what}, full rank", "LoRA r=8", ratio, reach))
    result.claims += [
        Claim("adapter file, ViT-B's linear layers", "LoRA r=8", found["svdtune"]["file"] / lora["file"], 1 / 14),
        Claim("memory of the bases, one-sided", "tuned weights", found["svdtune, one-sided"]["vectors"], 0.5),
    ]
    result.data["bytes"] = found
    return result


if __name__ == "__main__":
    run(measure)
