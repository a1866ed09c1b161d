"""Atomic writes of files and folders: complete or absent, even after a kill, a full disk or a power cut.

A file or folder is written under an unpredictable temporary name, synced to disk, and renamed. The next process that
writes into the same folder removes what killed processes left behind. Symbolic links inside an output folder are
replaced or refused, never followed, so nothing is written outside of the folder that the user named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sam_medical.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

if sys.platform != "win32":
    import fcntl

UNFINISHED = ".ssam-new-"
# Folders whose links are devices, such as /dev/stdout.
STREAM_FOLDERS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
STREAMS = ("stdout", "stderr", "1", "2")
_cleaned: set[Path] = set()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the suffix of ``path``. It replaces ``path`` if the block ends without an error.

    If ``path`` is a device or a pipe, the content is written into it instead.
    """
    if is_device(path):
        with _unfinished_file(Path(tempfile.gettempdir()), path) as temporary:
            yield temporary
            _append(temporary.read_bytes(), path)
            temporary.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), _unfinished_file(path.parent, path) as temporary:
        yield temporary
        bring_to_disk(temporary)
        temporary.replace(path)
        _sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to system errors without one, such as a full disk, and to those of safetensors."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. It replaces ``folder`` if the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), unfinished_folder(folder.parent) as temporary:
        yield temporary
        bring_to_disk(temporary)
        put_in_place(temporary, folder)


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. It is removed at the end of the block unless the block renames it."""
    remove_unfinished(parent)
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        with _holding(temporary) as is_ours:
            if is_ours:
                try:
                    yield temporary
                finally:
                    discard(temporary)
                return


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames a complete folder to ``folder``, and then removes the old one.

    If killed at any moment, either the old or the new folder remains, and `whole_folder` finds it.
    """
    old = _place_of_old(folder)
    if os.path.lexists(folder):
        discard(old)
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        restore(folder)
        raise
    _sync(folder.parent)
    discard(old)


def whole_folder(folder: Path) -> Path:
    """Returns the folder, or its old version if `put_in_place` was killed between its two renames."""
    old = _place_of_old(folder)
    return old if not folder.exists() and old.is_dir() and not old.is_symlink() else folder


def restore(folder: Path) -> None:
    """Completes an interrupted `put_in_place`: one folder remains, the new one if it is in place."""
    old = _place_of_old(folder)
    if whole_folder(folder) == old:
        with suppress(FileNotFoundError):  # another process of the run has restored it
            old.rename(folder)
    discard(old)


def remove(folder: Path) -> None:
    """Removes a folder atomically, by renaming it first."""
    if os.path.lexists(folder):
        with unfinished_folder(folder.parent) as temporary:
            folder.rename(temporary / "removed")


def discard(path: Path) -> None:
    """Removes a file, folder or link. The target of a link is kept."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def folder_in(parent: Path, *names: str) -> Path:
    """Returns a sub-folder of a folder that the user named, and creates it if needed.

    Raises:
        UserError: if part of the path is a link or a file.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        parent = parent / name
        refuse_link(parent)
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{parent} must be a folder, but it is a file; remove it.")
        parent.mkdir(exist_ok=True)
    return parent


def refuse_link(path: Path) -> None:
    """Raises a `UserError` if the path is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through links in an output folder; remove it.")


def is_device(path: Path) -> bool:
    """Whether the path is a device or a pipe, which is written into and not replaced."""
    is_stream = path.absolute().parent in STREAM_FOLDERS
    if path.is_symlink() and not is_stream:
        return False
    return path.exists() and not path.is_dir() and (not path.is_file() or (is_stream and path.name in STREAMS))


def remove_unfinished(folder: Path) -> None:
    """Removes temporary files of killed processes. Runs once per process and folder, because folders can be large."""
    resolved = folder.resolve()
    if resolved not in _cleaned:
        _cleaned.add(resolved)
        for path in resolved.glob(f"{UNFINISHED}*"):
            with _holding(path, wait=False) as is_ours:
                if is_ours:
                    with suppress(OSError):  # it belongs to another user
                        discard(path)


def bring_to_disk(path: Path) -> None:
    """Syncs a file, or a folder recursively, to disk, and sets its permissions by the umask."""
    mask = _umask()
    for inner in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if inner.is_file() or inner.is_dir():
            inner.chmod((0o777 if inner.is_dir() else 0o666) & ~mask)
            _sync(inner)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors to a safetensors file."""
    from safetensors.torch import save  # imported here: it takes seconds, which would delay ``--help``

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


@contextmanager
def _unfinished_file(folder: Path, path: Path) -> Iterator[Path]:
    """Yields an empty temporary file. It is removed at the end of the block unless the block renames it."""
    remove_unfinished(folder)
    suffix = "".join(path.suffixes[-2:])
    while True:
        descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=suffix if len(suffix) < 20 else "", dir=folder)
        os.close(descriptor)
        temporary = Path(name)
        with _holding(temporary) as is_ours:
            if is_ours:
                try:
                    yield temporary
                finally:
                    temporary.unlink(missing_ok=True)
                return


@contextmanager
def _holding(path: Path, wait: bool = True) -> Iterator[bool]:
    """Locks a path for the block. Yields whether the path exists and no other process uses it."""
    try:
        descriptor = _hold(path, wait)
    except OSError:
        yield False
        return
    try:
        yield descriptor is None or _is_same_file(descriptor, path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hold(path: Path, wait: bool) -> int | None:
    """Locks a path and returns the descriptor that holds the lock; None on systems without such locks.

    Raises:
        OSError: if the path does not exist, or ``wait`` is False and another process uses it.
    """
    if sys.platform == "win32":
        if wait:
            return None
        raise OSError("whether it is in use is not known")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not wait:
            os.close(descriptor)
            raise  # also on network drives without locks: nothing is cleaned up there
    return descriptor


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _append(content: bytes, device: Path) -> None:
    sys.stdout.flush()
    descriptor = os.open(device, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _place_of_old(folder: Path) -> Path:
    return folder.with_name(f".old.{folder.name}")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if sys.platform == "win32":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
