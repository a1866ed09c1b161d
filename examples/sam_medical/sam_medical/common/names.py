"""Folder names that are valid on Linux, macOS and Windows."""

from __future__ import annotations

LONGEST = 255  # bytes
FORBIDDEN = '<>:"/\\|?*'
# Device names on Windows, with any extension.
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{device}{number}" for device in ("com", "lpt") for number in "123456789¹²³"),
}


def why_not_a_folder(name: str) -> str | None:
    """Returns why a name cannot be a folder name; None if it can."""
    if not name or not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "stands for another folder"
    if not all(character.isprintable() for character in name):
        return "holds a control character"
    for character in FORBIDDEN:
        if character in name:
            return f"holds {character}"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space, or ends with a dot"
    if name.split(".")[0].strip().lower() in RESERVED:
        return "is a device's on Windows"
    if len(name.encode()) > LONGEST:
        return f"has more than {LONGEST} bytes"
    return None
