"""Files and folders that are either there as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def new_name(path: Path) -> Path:
    """Where something is made that will be renamed to ``path`` once it is complete."""
    return path.with_name(f".new.{path.name}")


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames a filled folder to ``folder``; what was there before goes only once the new one is complete."""
    old = folder.with_name(f".old.{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Puts back what `put_in_place` has moved away, if it was ended before the new folder was in place."""
    old = folder.with_name(f".old.{folder.name}")
    if old.is_dir() and not folder.exists():
        with suppress(FileNotFoundError):  # another process of the run was first
            old.rename(folder)


def remove(folder: Path) -> None:
    """Removes a folder, so that it is at no time there in parts."""
    if folder.exists():
        shutil.rmtree(new_name(folder), ignore_errors=True)
        folder.rename(new_name(folder))
        shutil.rmtree(new_name(folder), ignore_errors=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of ``folder`` if the block ends without an error."""
    temporary = new_name(folder)
    make_empty(temporary)
    yield temporary
    put_in_place(temporary, folder)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which is renamed to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_name(path)
    yield temporary
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(text)
