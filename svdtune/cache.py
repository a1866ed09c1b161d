"""Decompositions on disk, so that a weight is decomposed once and not at every load.

The name of a file is a hash of the weight's content and of what was asked of it, so a weight that has changed has
another name. Each file carries a digest of its own content: a file that is damaged, or not what was asked for, is
computed again. Files are written under a temporary name and renamed, so a reader finds a whole file or none. The least
recently used ones are removed when they take too much room.

The cache is a sub-folder that it has made and marked itself. It reads, replaces and removes only files there whose
names have its own form. Whoever may write to that folder is trusted with the model's results.
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
# The cache's own folder, inside the one that the user names.
FOLDER = "svdtune-decompositions"
# A cache directory tag (bford.info/cachedir) tells backup tools to leave the folder out; its second line is ours.
TAG_FILE = "CACHEDIR.TAG"
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Decompositions of weights, made by svdtune.\n"
MAXIMUM_BYTES = 20 * 2**30
FINISHED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9_]+\.unfinished")
A_DAY, A_MOMENT = 24 * 60 * 60, 10 * 60


def cache_folder(option: str | None) -> Path | None:
    """The cache in the folder that ``svd_cache`` of a config names, or else the environment variable; else None."""
    name = option or os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        return Path(name).expanduser() / FOLDER
    except RuntimeError as error:  # of a user without a home
        _warn(f"The cache {name} is not used: {error}")
        return None


def cached(
    folder: Path | None,
    request: tuple[object, ...],
    matrices: Tensor,
    compute: Callable[[], dict[str, Tensor]],
    fits: Callable[[Mapping[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """What ``compute`` returns for the matrices, from the cache if it is there; it is left there if not.

    Args:
        folder: The cache, made if it does not exist; without one, everything is computed.
        request: What the result depends on besides ``matrices``.
        matrices: The weight.
        compute: Makes the result, tensors by name.
        fits: Whether tensors have the names, shapes and dtypes of such a result.

    Warns:
        UserWarning: if the folder cannot be used, or holds a damaged file in the result's place.
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
            _warn(f"A decomposition could not be left in the cache: {error}.")
    return found


def _is_usable(folder: Path) -> bool:
    """Whether the folder is a cache of ours, once it is made and marked if there is nothing in it."""
    try:
        folder.mkdir(mode=0o775, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_mode & stat.S_IWOTH:
            _warn(f"The cache {folder} is not used: every user may write to it. Run chmod o-w on it.")
            return False
        tag = folder / TAG_FILE
        # What systems leave behind is nobody's, and a cleaner may have taken the tag.
        others = (path.name for path in folder.iterdir() if not path.name.startswith("."))
        if not tag.is_file() and all(FINISHED_NAME.fullmatch(name) for name in others):
            with contextlib.suppress(FileExistsError), tag.open("x") as file:  # another process may be first
                file.write(TAG)
        if not tag.is_file():
            _warn(f"The cache {folder} is not used: it holds files, and no {TAG_FILE} of ours. Give another folder.")
            return False
    except OSError as error:
        _warn(f"The cache {folder} is not used: {error}.")
        return False
    return True


def _warn(message: str) -> None:
    warnings.warn(f"{message} The cache is named by `svd_cache` or {VARIABLE}.", stacklevel=2)


def _hash_of_weight(request: tuple[object, ...], matrices: Tensor) -> str:
    """SHA-256 over the request, the dtype, the shape and the content."""
    whole = hashlib.sha256(repr(request).encode())
    add_tensor(whole, matrices)
    return whole.hexdigest()


def _read(path: Path, fits: Callable[[Mapping[str, Tensor]], bool]) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is not there, damaged or not what was asked for."""
    if not _is_regular(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
            # Copies, because a mapped file that somebody truncates or overwrites later would take them along.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
    # RuntimeError is torch's, which opens the file a second time, when it may just have been removed.
    except (OSError, RuntimeError, SafetensorError):
        tensors, digest = {}, None
    whole = digest is not None and fits(tensors) and digest == digest_of_all(tensors)
    # Vectors have length one, and S and 1 / S are in float64, so a sum is finite where all is; it needs no memory.
    if not whole or not all(tensor.sum(dtype=torch.float64).isfinite() for tensor in tensors.values()):
        if path.exists():
            _warn(f"{path} is damaged, so its weight is decomposed again.")
        return None
    with contextlib.suppress(OSError):  # a folder that others write to, and we only read
        os.utime(path)  # the time of its last use
    return tensors


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    if 2 * size > shutil.disk_usage(path.parent).free or not _make_room(path.parent, size):
        return
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".unfinished")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(on_cpu, metadata={"digest": digest_of_all(on_cpu)}))
        os.chmod(name, stat.S_IMODE((path.parent / TAG_FILE).stat().st_mode))  # temporary files are for one user only
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _make_room(folder: Path, size: int) -> bool:
    """Whether a file of that size has room beside the others in `MAXIMUM_BYTES`, once the least recently used ones and
    what killed writers have left are removed.

    Files that were used a moment ago stay: they belong to the model that is being loaded. If it has more of them than
    there is room for, the first ones are kept, because each would otherwise remove what is needed next.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process makes room, too
            status = path.lstat()
            age = time.time() - status.st_mtime
            if not stat.S_ISREG(status.st_mode):
                continue
            if UNFINISHED_NAME.fullmatch(path.name) and age > A_DAY:
                path.unlink()
            elif FINISHED_NAME.fullmatch(path.name):
                files.append((age, status.st_size, path))
    excess = sum(taken for _, taken, _ in files) + size - MAXIMUM_BYTES
    for age, taken, path in sorted(files, reverse=True):
        if excess <= 0 or age < A_MOMENT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= taken
    return excess <= 0
