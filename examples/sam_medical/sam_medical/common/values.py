"""What a value that was read from a file is, before anything relies on it."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**53
LARGEST_IMAGE = 8192
LONGEST_TEXT = 4096
LONGEST_SHOWN = 200


def is_whole(value: Any) -> bool:
    """Whether it is a whole number that a float holds exactly; true and false are none."""
    return type(value) is int and abs(value) <= LARGEST


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return is_whole(value) or (type(value) is float and math.isfinite(value))


def shortened(value: Any) -> str:
    """A value as it can stand in a message of one line."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
