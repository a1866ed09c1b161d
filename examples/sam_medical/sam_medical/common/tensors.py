"""Reading of untrusted safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sam_medical.common.errors import UserError, first_line


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: if the file is damaged, or contains NaN or infinity.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); train again, or download the file again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; train again, or download the file again.")
    return tensors


def check_like(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a `UserError` if tensors differ from the expected ones in name, shape or dtype."""
    differing = sorted(tensors.keys() ^ expected.keys())
    if differing:
        raise UserError(
            f"{path} does not fit its own configuration: {len(differing)} tensors are missing or unknown, first of "
            f"them {differing[0]}; train again, or download the whole folder again."
        )
    for name, tensor in tensors.items():
        like = expected[name]
        is_alike = tensor.dtype == like.dtype or (tensor.is_floating_point() and like.is_floating_point())
        if not is_alike or tensor.shape != like.shape:
            raise UserError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and must be {like.dtype} of shape "
                f"{tuple(like.shape)}; train again, or download the whole folder again."
            )
