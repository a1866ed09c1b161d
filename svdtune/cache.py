"""A disk cache of decompositions, so that a weight is decomposed once and not at every load.

The file name is a hash of the weight's content and of the request, so a changed weight has another file. Each file
contains a digest of its content. If the digest or the shapes do not match, the decomposition is computed again. Files
are written under a temporary name and renamed, so a reader finds a complete file or none. The least recently used
files are removed when the cache exceeds its maximum size.

The cache is a sub-folder that it creates and marks itself. It reads, replaces and removes only files in it whose names
match its own pattern. Security: anyone who can write to that folder can change the model's outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svdtune.digests import add_tensor, digest_of_all

VARIABLE = "SVDTUNE_CACHE"
# The sub-folder of the user's folder that holds the cache.
FOLDER = "svdtune-decompositions"
# A cache directory tag (bford.info/cachedir) makes backup tools skip the folder. Its second line is our own.
TAG_FILE = "CACHEDIR.TAG"
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Decompositions of weights, made by svdtune.\n"
MAXIMUM_BYTES = 20 * 2**30
FINISHED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9_]+\.unfinished")
DAY, RECENT = 24 * 60 * 60, 10 * 60  # seconds


def cache_folder(option: str | None) -> Path | None:
    """The cache folder from ``svd_cache`` of a config or, without it, from the environment variable; else None."""
    name = option or os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        return Path(name).expanduser() / FOLDER
    except RuntimeError as error:  # the user has no home directory
        _warn(f"The cache {name} is not used: {error}")
        return None


def cached(
    folder: Path | None,
    request: tuple[object, ...],
    matrices: Tensor,
    compute: Callable[[], dict[str, Tensor]],
    fits: Callable[[Mapping[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """Returns the result of ``compute`` from the cache, or computes and stores it.

    Args:
        folder: The cache folder, created if it does not exist. If None, nothing is cached.
        request: Everything that the result depends on, except ``matrices``.
        matrices: The weight.
        compute: Computes the result, as tensors by name.
        fits: Whether tensors have the names, shapes and dtypes of a result.

    Returns:
        The tensors by name.

    Warns:
        UserWarning: if the folder cannot be used, or if the cached file is damaged.
    """
    if folder is None or not _is_usable(folder):
        return compute()
    path = folder / f"{_hash_of_weight(request, matrices)}.safetensors"
    found = _read(path, fits)
    if found is None:
        found = compute()
        try:
            _write(path, found)
        except OSError as error:
            _warn(f"A decomposition could not be written to the cache: {error}.")
    return found


def _is_usable(folder: Path) -> bool:
    """Whether the folder is one of our caches. Creates it if missing, and marks it if empty."""
    try:
        folder.mkdir(mode=0o775, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_mode & stat.S_IWOTH:
            _warn(f"The cache {folder} is not used: every user may write to it. Run chmod o-w on it.")
            return False
        tag = folder / TAG_FILE
        # Ignore hidden files of the system. A cleaner may have removed the tag from a cache of ours.
        others = (path.name for path in folder.iterdir() if not path.name.startswith("."))
        if not tag.is_file() and all(FINISHED_NAME.fullmatch(name) for name in others):
            with contextlib.suppress(FileExistsError), tag.open("x") as file:  # another process may be first
                file.write(TAG)
        if not tag.is_file():
            _warn(f"The cache {folder} is not used: it holds files, but no {TAG_FILE} of ours. Give another folder.")
            return False
    except OSError as error:
        _warn(f"The cache {folder} is not used: {error}.")
        return False
    return True


def _warn(message: str) -> None:
    warnings.warn(f"{message} The cache folder is set by `svd_cache` or {VARIABLE}.", stacklevel=2)


def _hash_of_weight(request: tuple[object, ...], matrices: Tensor) -> str:
    """SHA-256 of the request and of the weight's dtype, shape and content, in hexadecimal digits."""
    whole = hashlib.sha256(repr(request).encode())
    add_tensor(whole, matrices)
    return whole.hexdigest()


def _read(path: Path, fits: Callable[[Mapping[str, Tensor]], bool]) -> dict[str, Tensor] | None:
    """The tensors of a file, or None if it is missing, damaged or does not fit the request."""
    if not _is_regular(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
            # Copy: the tensors of a mapped file change if another process truncates or overwrites it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
    # torch opens the file a second time, and raises a RuntimeError if it was removed in between.
    except (OSError, RuntimeError, SafetensorError):
        tensors, digest = {}, None
    whole = digest is not None and fits(tensors) and digest == digest_of_all(tensors)
    # The sum of finite values is finite here: vectors have unit length, S and 1 / S are float64. It needs no memory.
    if not whole or not all(tensor.sum(dtype=torch.float64).isfinite() for tensor in tensors.values()):
        if path.exists():
            _warn(f"{path} is damaged, so its weight is decomposed again.")
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only for us
        os.utime(path)  # marks it as recently used
    return tensors


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    if 2 * size > shutil.disk_usage(path.parent).free or not _free_space(path.parent, size):
        return
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".unfinished")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(on_cpu, metadata={"digest": digest_of_all(on_cpu)}))
        # A temporary file is readable by its owner only.
        os.chmod(name, stat.S_IMODE((path.parent / TAG_FILE).stat().st_mode))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _free_space(folder: Path, size: int) -> bool:
    """Removes old files until ``size`` more bytes fit within `MAXIMUM_BYTES`, and returns whether they do.

    It removes the least recently used files, and temporary files of killed processes. It keeps files used within
    `RECENT`, because they belong to the model that is being loaded. If that model exceeds the cache, its first files
    stay. Otherwise each file would evict the one that is needed next.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may remove files at the same time
            status = path.lstat()
            age = time.time() - status.st_mtime
            if not stat.S_ISREG(status.st_mode):
                continue
            if UNFINISHED_NAME.fullmatch(path.name) and age > DAY:
                path.unlink()
            elif FINISHED_NAME.fullmatch(path.name):
                files.append((age, status.st_size, path))
    excess = sum(taken for _, taken, _ in files) + size - MAXIMUM_BYTES
    for age, taken, path in sorted(files, reverse=True):
        if excess <= 0 or age < RECENT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= taken
    return excess <= 0
