"""Checks of option values by the option's name and type. Each error is reported in one line."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sam_medical.common.choices import LEAST_TILE
from sam_medical.common.errors import UserError
from sam_medical.common.paths import why_no_file, why_no_folder, why_not_a_path
from sam_medical.common.values import LARGEST_IMAGE, LONGEST_TEXT, shortened

# The allowed range of each number.
LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (1, LARGEST_IMAGE),
    "tile": (LEAST_TILE, LARGEST_IMAGE),
    "fold": (1, 10**4),
    "steps": (1, 10**8),
    "batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 10**6),
    "learning_rate": (0, 1e3),
    "value_rate": (0, 1e6),
    "warmup_steps": (0, 10**8),
    "weight_decay": (0, 1e3),
    "focal_weight": (0, 1e6),
    "num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "validate_every": (1, 10**8),
    "validation_images": (1, 10**9),
    "overlays": (0, 10**6),
    "seeds": (1, 10**6),
    "folds": (1, 10**4),
    "jobs": (1, 1024),
    "examples": (1, 10**4),
    "rounds": (1, 10**6),
    "batches": (1, 10**6),
}
ABOVE_ZERO = ("learning_rate", "value_rate")
# Options that are files or folders. backbone and text_encoder may also be names on the Hugging Face Hub.
PATHS = (
    *("data_root", "output_dir", "adapter", "images", "output", "csv", "markdown", "scores", "against", "sheet"),
    *("json", "dump", "report"),
    *("backbone", "text_encoder"),
)
MOST_CHOICES_IN_A_SENTENCE = 3


def check_values(options: Any) -> None:
    """Checks every option by its name and type, and expands ``~`` in paths.

    Raises:
        UserError: if a number is out of range, a word is not one of its choices, a text is empty or too long, a list
            has duplicates, or a path is invalid.
    """
    words = choices_of(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None or (value == f.default and not isinstance(value, float)):
            continue
        if f.name in PATHS or (f.name == "overlays" and isinstance(value, str)):
            if reason := why_not_a_path(value):
                raise UserError(f"{f.name} is {shortened(value)}, which {reason}.")
            setattr(options, f.name, os.path.expanduser(value))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                fits = bool(text.strip()) and len(text) <= LONGEST_TEXT and "\0" not in text
                require(options, f.name, fits, f"must be a text of 1 to {LONGEST_TEXT} characters")
        if isinstance(value, list):
            require(options, f.name, len(set(value)) == len(value), "names one twice")
        if f.name in LIMITS and not isinstance(value, str):
            _check_number(options, f.name, value)
        if f.name in words:
            require(options, f.name, value in words[f.name], f"must be {in_words(words[f.name])}")


def choices_of(options_type: Any) -> dict[str, tuple[str, ...]]:
    """Returns the choices of each option whose type is a `Literal`."""
    hints = get_type_hints(options_type)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def in_words(choices: tuple[str, ...]) -> str:
    if len(choices) > MOST_CHOICES_IN_A_SENTENCE:
        return f"one of {', '.join(choices)}"
    return " or ".join(filter(None, (", ".join(choices[:-1]), *choices[-1:])))


def require_file_to_be(options: object, name: str) -> None:
    """Raises a `UserError` if the option's file cannot be written."""
    path = getattr(options, name)
    reason = None if path is None else why_no_file(Path(path))
    require(options, name, reason is None, f"must be a file, in a folder or one that can be made ({reason})")


def require_folder_to_be(options: object, name: str) -> None:
    """Raises a `UserError` if the option's folder cannot be created or written."""
    path = getattr(options, name)
    reason = None if path is None else why_no_folder(Path(path))
    require(options, name, reason is None, f"must be a folder, or one that can be made ({reason})")


def require(options: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} is {shortened(getattr(options, name))}, but it {rule}.")


def _check_number(options: object, name: str, value: float) -> None:
    least, most = LIMITS[name]
    if name in ABOVE_ZERO:
        require(options, name, value > 0, "must be above 0")
    require(options, name, not value < least, f"must be at least {least}" if least else "must not be negative")
    require(options, name, value <= most, f"must be a number of at most {most}")
