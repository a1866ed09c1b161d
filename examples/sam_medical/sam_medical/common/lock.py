"""A lock per output folder, so only one command at a time writes into it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sam_medical.common.errors import UserError, describe
from sam_medical.common.files import folder_in

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"


@contextmanager
def only_command_in(folder: Path) -> Iterator[None]:
    """Locks a folder for this command until the block or the process ends.

    If a launcher starts several processes, only rank 0 takes the lock. A POSIX record lock belongs to the process, and
    data-loading workers do not inherit it. So the lock is released at once if the process is killed. flock, which the
    package filelock uses, would be inherited. On Windows there is no such lock, and nothing is locked.

    Raises:
        UserError: if another command uses the folder, or the folder cannot be written.
    """
    if sys.platform == "win32" or os.environ.get("RANK", "0") != "0":
        yield
        return
    is_new = not folder.exists()
    path = folder / LOCK_FILE
    try:
        folder_in(folder)
        descriptor = _take(path)
    except OSError as error:
        raise UserError(f"output_dir is {str(folder)!r}, which cannot be written ({describe(error)}).") from error
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(_this_process()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def command_in(folder: Path) -> str | None:
    """Describes the process that uses a folder; None if there is none."""
    path = folder / LOCK_FILE
    if sys.platform == "win32" or not path.is_file():
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _lock(descriptor) else _holder(descriptor)
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not _lock(descriptor):
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"{path.parent} is in use by {holder}; wait for it, or give another --output-dir.")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        os.close(descriptor)  # the previous holder has just removed the file


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except PermissionError:  # some systems raise this instead
        return False
    return True


def _this_process() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, TypeError, KeyError, OSError):
        return "another process, which has just begun"
