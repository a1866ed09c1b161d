"""Measures the environment of a run: versions, device, digests of the images, and peak memory."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sam_medical.common.errors import UserError
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.survey import Survey

PACKAGES = ("svdtune", "torch", "peft", "transformers", "accelerate", "monai", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the versions of Python and of the main packages, and the device."""
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "machine": machine}


def check_images(
    splits: Mapping[str, SegmentationDataset], surveys: Mapping[str, Survey] | None = None
) -> dict[str, dict[str, Any]]:
    """Reads every image and mask once, to find damaged files before training.

    Args:
        splits: The splits of the dataset.
        surveys: Surveys that collect statistics of the splits.

    Returns:
        Per split, the number of images, and 16 hexadecimal digits that identify their names, pixels and masks.

    Raises:
        UserError: if an image cannot be read, or two of a split have the same name.
    """
    summary = {}
    bar = tqdm(desc="checking the images", total=sum(map(len, splits.values())), unit="image", leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for split, dataset in splits.items():
            digest, names = hashlib.sha256(), set()
            for name, line in pool.map(partial(_line, dataset, (surveys or {}).get(split)), range(len(dataset))):
                if name in names:
                    raise UserError(f"two images of the split {split} are called {name!r}; give each its own name.")
                names.add(name)
                digest.update(line.encode())
                bar.update()
            summary[split] = {"images": len(dataset), "hash": digest.hexdigest()[:16]}
    return summary


def _line(dataset: SegmentationDataset, survey: Survey | None, index: int) -> tuple[str, str]:
    """Returns the name of an image, and a line that identifies it and its masks."""
    sample = dataset[index]
    if survey is not None:
        survey.add(sample)
        survey.look_at(dataset.scan(index), dataset.reading)
    digest = hashlib.sha256(np.ascontiguousarray(sample.image).tobytes())
    digest.update(np.packbits(sample.masks).tobytes())
    return sample.name, f"{sample.name} {sample.masks.shape} {digest.hexdigest()}\n"


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak allocated GPU memory or, on the CPU, resident memory, in bytes; None for a CPU on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
