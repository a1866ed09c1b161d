"""Digests of tensors: whether what is read is what was written. They find damage, and are no signature."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

# Content is hashed in pieces of that many bytes, several at a time.
PIECE_BYTES = 2**20
# Hexadecimal digits that are kept of the digest of one tensor.
DIGITS = 16
# What PEFT puts before the names of a model's tensors in an adapter file.
PEFT_PREFIX = "base_model.model."


def add_tensor(whole: hashlib._Hash, tensor: Tensor) -> None:
    """Adds dtype, shape and content of a tensor, on any device, to a hash."""
    content = cast(memoryview, tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy())
    whole.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
    pieces = [content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES)]
    if len(pieces) < 2:
        digests = [hashlib.sha256(piece).digest() for piece in pieces]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            digests = list(threads.map(lambda piece: hashlib.sha256(piece).digest(), pieces))
    for digest in digests:
        whole.update(digest)


def digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and contents of tensors, in hexadecimal digits."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        add_tensor(whole, tensors[name])
    return whole.hexdigest()


def digest_of_each(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A short digest of each tensor over its name, dtype, shape and content, by its name in the base model.

    Tensors without content here (on the meta device, or sharded) have none.
    """
    digests = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_meta and not hasattr(tensor, "full_tensor"):
            name = key.removeprefix(PEFT_PREFIX)
            whole = hashlib.sha256(name.encode())
            add_tensor(whole, tensor)
            digests[name] = whole.hexdigest()[:DIGITS]
    return digests


class Measurement:
    """The digests of tensors at a time, and whether they have changed since.

    Args:
        tensors: What is about to be saved.
        others: Digests of what goes with them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: Mapping[str, str]) -> None:
        self.digests = {**digest_of_each(tensors), **others}
        self.time = time.time()
        tracked = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor) and not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in tracked]

    def is_stale(self) -> bool:
        """Whether a tensor was changed in place, as an optimizer does."""
        return any(tensor._version != version for tensor, version in self._versions)


def digests_of_file(path: Path) -> dict[str, str]:
    """`digest_of_each` tensor of a safetensors file.

    Raises:
        SafetensorError: if the file is not whole.
    """
    with safe_open(path, framework="pt") as file:
        return digest_of_each({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
