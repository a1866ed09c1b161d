"""Whether something can be written to a path, told before the work that is to be written."""

from __future__ import annotations

import os
from pathlib import Path, PurePath, PureWindowsPath

from sam_medical.common.files import is_device
from sam_medical.common.names import LONGEST

LONGEST_PATH = 4095  # bytes, on Linux


def why_not_a_path(text: str) -> str | None:
    """Why no system has such a path; None if one can."""
    if "\0" in text:
        return "holds a zero byte"
    if len(os.fsencode(text)) > LONGEST_PATH:
        return f"has more than {LONGEST_PATH} bytes"
    if any(len(os.fsencode(part)) > LONGEST for part in Path(text).parts):
        return f"has a name of more than {LONGEST} bytes"
    return None


def why_no_file(path: Path) -> str | None:
    """Why a file cannot be written there; None if it can."""
    if is_device(path):
        return None if os.access(path, os.W_OK) else "it cannot be written"
    if path.is_dir():
        return "a folder is in its place"
    return _why_not_below(path.parent)


def why_no_folder(path: Path) -> str | None:
    """Why a folder cannot be made or filled there; None if it can."""
    if path.exists() and not path.is_dir():
        return "it is no folder"
    return _why_not_below(path)


def _why_not_below(folder: Path) -> str | None:
    """About the nearest that exists of a folder and those above it, in which the others would be made."""
    try:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            return f"{nearest} is no folder"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return f"{nearest} cannot be written"
    except OSError as error:
        return error.strerror
    return None


def own_name(base: str) -> str:
    """The name of a base model without its place on this machine; a name on the hub stays as it is."""
    is_here = any(kind(base).is_absolute() for kind in (PurePath, PureWindowsPath)) or ".." in PurePath(base).parts
    return PurePath(base.replace("\\", "/")).name if is_here else base
