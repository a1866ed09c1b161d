"""Checks of output paths, so that errors are found before the work and not after it."""

from __future__ import annotations

import os
from pathlib import Path, PurePath, PureWindowsPath

from sam_medical.common.files import is_device
from sam_medical.common.names import LONGEST

LONGEST_PATH = 4095  # bytes, on Linux


def why_not_a_path(text: str) -> str | None:
    """Returns why a text cannot be a path; None if it can."""
    if "\0" in text:
        return "holds a zero byte"
    if len(os.fsencode(text)) > LONGEST_PATH:
        return f"has more than {LONGEST_PATH} bytes"
    if any(len(os.fsencode(part)) > LONGEST for part in Path(text).parts):
        return f"has a name of more than {LONGEST} bytes"
    return None


def why_no_file(path: Path) -> str | None:
    """Returns why a file cannot be written to a path; None if it can."""
    if is_device(path):
        return None if os.access(path, os.W_OK) else "it cannot be written"
    if path.is_dir():
        return "a folder is in its place"
    return _why_not_below(path.parent)


def why_no_folder(path: Path) -> str | None:
    """Returns why a folder cannot be created or written; None if it can."""
    if path.exists() and not path.is_dir():
        return "it is not a folder"
    return _why_not_below(path)


def _why_not_below(folder: Path) -> str | None:
    """Returns why the nearest existing ancestor of a folder cannot be written; None if it can."""
    try:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return f"{nearest} cannot be written"
    except OSError as error:
        return error.strerror
    return None


def own_name(base: str) -> str:
    """Returns the last name of a base model's local path. Names on the Hugging Face Hub are unchanged."""
    is_here = any(kind(base).is_absolute() for kind in (PurePath, PureWindowsPath)) or ".." in PurePath(base).parts
    return PurePath(base.replace("\\", "/")).name if is_here else base
