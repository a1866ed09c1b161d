"""Files and folders that are either there as a whole or not at all, also after a kill, a full disk or a power cut.

Each is made under a name that nobody can guess, brought to the disk, and then renamed. What a killed process has left
of such names is removed by the next one that writes into the same folder. A link that lies in a folder of ours is
replaced or refused, and never followed: nothing is written outside of the folder that the user has named.
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
# Where links stand for devices, as /dev/stdout does, whatever that is at the time.
STREAM_FOLDERS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
STREAMS = ("stdout", "stderr", "1", "2")
_cleaned: set[Path] = set()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of ``path`` if the block ends without an error.

    The path ends as ``path`` does. What is written goes into ``path`` if that is a device or a pipe.
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
    """Gives a path to those errors of the system that have none, as that of a full disk, and to safetensors' own."""
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
    """Gives an empty folder to fill, which takes the place of ``folder`` if the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), unfinished_folder(folder.parent) as temporary:
        yield temporary
        bring_to_disk(temporary)
        put_in_place(temporary, folder)


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """Gives an empty folder, which is removed at the end of the block unless it has been renamed."""
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
    """Renames a filled folder to ``folder``; what was there before goes only once the new one is complete.

    Ended at any moment, it leaves one of the two where `whole_folder` finds it.
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
    """The folder, or the one that was to be replaced, if `put_in_place` was ended before the new one was in place."""
    old = _place_of_old(folder)
    return old if not folder.exists() and old.is_dir() and not old.is_symlink() else folder


def restore(folder: Path) -> None:
    """Brings to its end what `put_in_place` was ended in: one folder remains, the new one if it is in place."""
    old = _place_of_old(folder)
    if whole_folder(folder) == old:
        with suppress(FileNotFoundError):  # another process of the run was first
            old.rename(folder)
    discard(old)


def remove(folder: Path) -> None:
    """Removes a folder, so that it is at no time there in parts."""
    if os.path.lexists(folder):
        with unfinished_folder(folder.parent) as temporary:
            folder.rename(temporary / "removed")


def discard(path: Path) -> None:
    """Removes whatever is there, a link and not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def folder_in(parent: Path, *names: str) -> Path:
    """A folder below one that the user has named; made if it is not there.

    Raises:
        UserError: if a link leads out of the user's folder, or a file stands in its place.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        parent = parent / name
        refuse_link(parent)
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{parent} is to be a folder, and a file is in its place; remove it.")
        parent.mkdir(exist_ok=True)
    return parent


def refuse_link(path: Path) -> None:
    """Raises a UserError if the path is a link."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through links in an output folder; remove it.")


def is_device(path: Path) -> bool:
    """Whether something is to be written into what is there, a device or a pipe, and not to be put in its place."""
    is_stream = path.absolute().parent in STREAM_FOLDERS
    if path.is_symlink() and not is_stream:
        return False
    return path.exists() and not path.is_dir() and (not path.is_file() or (is_stream and path.name in STREAMS))


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left in a folder half made; once a process, since folders can be large."""
    resolved = folder.resolve()
    if resolved not in _cleaned:
        _cleaned.add(resolved)
        for path in resolved.glob(f"{UNFINISHED}*"):
            with _holding(path, wait=False) as is_ours:
                if is_ours:
                    with suppress(OSError):  # another user's
                        discard(path)


def bring_to_disk(path: Path) -> None:
    """Makes a file, or all that is in a folder, outlive a power cut; readable to whom the umask says."""
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
    """A safetensors file."""
    from safetensors.torch import save  # here, since its import takes seconds that help and options need not wait for

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


@contextmanager
def _unfinished_file(folder: Path, path: Path) -> Iterator[Path]:
    """Gives an empty file in the folder, which is removed at the end of the block unless it has been renamed."""
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
    """Marks a path as in use while entered; gives whether it is there and in no one else's use."""
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
    """Locks a path until the process ends or closes what is returned; None where nothing can be locked.

    Raises:
        OSError: if it is not there, or somebody else's and not waited for.
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
            raise  # also on network drives that know no locks, where nothing is cleaned up
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
    if sys.platform == "win32":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
