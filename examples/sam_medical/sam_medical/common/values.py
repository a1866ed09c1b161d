"""Checks of values from untrusted files."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**53
LARGEST_IMAGE = 8192
LONGEST_TEXT = 4096
LONGEST_SHOWN = 200


def is_whole(value: Any) -> bool:
    """Whether a value is an integer that a float represents exactly. Booleans are not integers here."""
    return type(value) is int and abs(value) <= LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. Booleans are not numbers here."""
    return is_whole(value) or (type(value) is float and math.isfinite(value))


def shortened(value: Any) -> str:
    """Returns the repr of a value, cut to `LONGEST_SHOWN` characters for messages."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
