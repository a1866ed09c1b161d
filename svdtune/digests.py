"""Digests of tensors, to detect damaged files. They are not signatures: anyone can compute a matching digest."""

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

# Content is hashed in pieces of this many bytes, several in parallel.
PIECE_BYTES = 2**20
# Number of hexadecimal digits kept per tensor.
DIGITS = 16
# PEFT's prefix of tensor names in an adapter file.
PEFT_PREFIX = "base_model.model."


def add_tensor(whole: hashlib._Hash, tensor: Tensor) -> None:
    """Updates a hash with a tensor's dtype, shape and content. The tensor may be on any device."""
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
    """SHA-256 of the names, dtypes, shapes and contents of tensors, in hexadecimal digits."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        add_tensor(whole, tensors[name])
    return whole.hexdigest()


def digest_of_each(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A short digest per tensor of its name, dtype, shape and content, by its name in the base model.

    Tensors on the meta device and sharded tensors are skipped, because their content is not available.
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
    """A snapshot of the digests of tensors. It can tell whether they have changed since.

    Args:
        tensors: The tensors that are about to be saved.
        others: More digests to store with them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: Mapping[str, str]) -> None:
        self.digests = {**digest_of_each(tensors), **others}
        self.time = time.time()
        tracked = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor) and not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in tracked]

    def is_stale(self) -> bool:
        """Whether a tensor was modified in place after the snapshot, as an optimizer does."""
        return any(tensor._version != version for tensor, version in self._versions)


def digests_of_file(path: Path) -> dict[str, str]:
    """The digests of all tensors of a safetensors file; see `digest_of_each`.

    Raises:
        SafetensorError: if the file is incomplete.
    """
    with safe_open(path, framework="pt") as file:
        return digest_of_each({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
