"""Decompositions on disk, so that a weight is taken apart once and not at every load.

A file's name is a hash of the weight's content and of what was asked of it: a weight that has changed has another
name, so what is found is never wrong. Files are written under another name and renamed, so that whoever reads or
writes at the same time finds a whole file or none. The least recently used ones go when there are too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

VARIABLE = "SVDTUNE_CACHE"
MAXIMUM_BYTES = 20 * 2**30
# Weights are hashed in pieces of that many bytes, several at a time.
PIECE_BYTES = 2**20
SUFFIX, UNFINISHED = ".safetensors", ".unfinished"
A_DAY = 24 * 60 * 60


def cache_folder(option: str | None) -> Path | None:
    """The folder that ``svd_cache`` of a config names, or else the environment variable; None if neither does."""
    name = option or os.environ.get(VARIABLE)
    return Path(name).expanduser() if name else None


def cached(
    folder: Path | None, request: tuple[object, ...], matrices: Tensor, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``compute`` returns for the matrices, from the folder if it is there; it is left there if not.

    Args:
        folder: The cache, made if it does not exist; without one, everything is computed.
        request: What the result depends on besides ``matrices``.
        matrices: The weight.
        compute: Makes the result, tensors by name.
    """
    if folder is None:
        return compute()
    path = folder / f"{_content_hash(request, matrices)}{SUFFIX}"
    found = _read(path)
    if found is None:
        found = compute()
        try:
            _write(path, found)
        except OSError as error:
            warnings.warn(
                f"A decomposition could not be left in the cache: {error}. Look at `svd_cache`, or {VARIABLE}.",
                stacklevel=2,
            )
    return found


def _content_hash(request: tuple[object, ...], matrices: Tensor) -> str:
    """SHA-256 over the request, dtype and shape, and the digests of the pieces of the content."""
    content = matrices.detach().to("cpu").contiguous().view(torch.uint8).flatten().numpy()
    pieces = [content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES)]
    whole = hashlib.sha256(repr((request, matrices.dtype, tuple(matrices.shape))).encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for digest in threads.map(lambda piece: hashlib.sha256(piece).digest(), pieces):
            whole.update(digest)
    return whole.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, mapped into memory; None if it is not there or not whole."""
    try:
        tensors = load_file(path)
        os.utime(path)  # the time of its last use
        return tensors
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ):  # torch opens it a second time, when it may just have been removed
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if size > MAXIMUM_BYTES or 2 * size > shutil.disk_usage(path.parent).free:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=UNFINISHED, delete=False) as file:
        unfinished = Path(file.name)
    try:
        save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Removes the least recently used files until all take up no more than `MAXIMUM_BYTES`, and what writers that were
    killed have left."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            status = path.stat()
            if path.suffix == UNFINISHED and time.time() - status.st_mtime > A_DAY:
                path.unlink()
            elif path.suffix == SUFFIX:
                files.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in files) - MAXIMUM_BYTES
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size
