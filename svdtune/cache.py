"""Decompositions on disk, so that a weight is taken apart once and not at every load.

A file's name is a hash of the weight's content and of what was asked of it: a weight that has changed has another
name, so what is found is never wrong. Files are written under another name and renamed, so that whoever reads or
writes at the same time finds a whole file or none. The least recently used ones go when they take too much room.
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
A_DAY, A_MOMENT = 24 * 60 * 60, 10 * 60


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
    # RuntimeError is torch's, which opens it a second time, when it may just have been removed.
    except (OSError, RuntimeError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # a folder that others write to, and we only read
        os.utime(path)  # the time of its last use
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if 2 * size > shutil.disk_usage(path.parent).free or not _make_room(path.parent, size):
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=UNFINISHED, delete=False) as file:
        unfinished = Path(file.name)
    try:
        save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.chmod(0o666 & ~_umask())  # temporary files are for their owner only
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _make_room(folder: Path, size: int) -> bool:
    """Whether a file of that size has room beside the others in `MAXIMUM_BYTES`, once the least recently used ones and
    what killed writers have left are removed.

    Files that were used a moment ago stay: they are of the model that is being loaded. If it has more of them than
    there is room for, the first ones are kept, for each would otherwise remove what is needed next.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process makes room, too
            status = path.stat()
            age = time.time() - status.st_mtime
            if path.suffix == UNFINISHED and age > A_DAY:
                path.unlink()
            elif path.suffix == SUFFIX:
                files.append((age, status.st_size, path))
    excess = sum(taken for _, taken, _ in files) + size - MAXIMUM_BYTES
    for age, taken, path in sorted(files, reverse=True):
        if excess <= 0 or age < A_MOMENT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= taken
    return excess <= 0


def _umask() -> int:
    """What this process takes away from the rights of new files; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
