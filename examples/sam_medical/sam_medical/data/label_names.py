"""Label names and their values or colours, from labels.json or nnU-Net's dataset.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError, first_line
from sam_medical.common.values import shortened
from sam_medical.data.base import require_label_names
from sam_medical.data.masks import BACKGROUND_NAMES, Colour, parse_colour
from sam_medical.data.sources import plain

DARKEST_COLOUR = 64
RULE = (
    'give each label a whole number of its own above zero, {"liver": 1, "tumor": 2}, or a colour of its own, '
    '{"liver": "#ff0000"}.'
)


@dataclass(frozen=True)
class LabelNames:
    """The labels of a label map, with their values or colours.

    Attributes:
        values: The values of each label; empty if labels have colours.
        colours: The colour of each label; empty if labels have values.
        backgrounds: Further background colours besides black.
    """

    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    colours: Mapping[str, Colour] = field(default_factory=dict)
    backgrounds: tuple[Colour, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.values or self.colours)


def read_json(path: Path) -> Any:
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        UserError: if the file is not JSON, or repeats a key.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_repetition)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}.") from error


def read_label_names(path: Path) -> LabelNames:
    """Reads ``labels.json``. Raises as `label_names`."""
    return label_names(read_json(path), path)


def label_names(content: Any, path: Path) -> LabelNames:
    """Parses {"liver": 1}, {"liver": "#ff0000"}, or the inverse {"1": "liver"}.

    Args:
        content: The parsed JSON.
        path: The file, for error messages.

    Raises:
        UserError: if a value is missing, two labels share one, or values and colours are mixed.
    """
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds {shortened(content)}; it must {RULE}")
    if all(key.isdigit() and isinstance(value, str) and not value.isdigit() for key, value in content.items()):
        content = {value: int(key) for key, value in content.items()}
    content = {plain(name): value for name, value in content.items()}
    ignored = [name for name in content if name.lower() == "ignore"]
    if ignored:
        raise UserError(f"{path} has the label {ignored[0]!r}, but pixels cannot be ignored; remove it.")
    backgrounds = [value for name, value in content.items() if name.lower() in BACKGROUND_NAMES]
    content = {name: value for name, value in content.items() if name.lower() not in BACKGROUND_NAMES}
    numbers = {name: _as_numbers(value) for name, value in content.items()}
    colours = {name: parse_colour(value) for name, value in content.items()}
    require_label_names(list(content), path)
    if content and all(numbers.values()):
        values = {name: entries for name, entries in numbers.items() if entries}
        singles = [entries for entries in values.values() if len(entries) == 1]
        if len(set(singles)) == len(singles) and all(value in (0, [0]) for value in backgrounds):
            return LabelNames(values=values)
    if content and all(colours.values()) and len(set(colours.values())) == len(colours):
        known = {name: colour for name, colour in colours.items() if colour}
        if (0, 0, 0) not in known.values():
            others = tuple(colour for value in backgrounds if (colour := parse_colour(value)))
            return LabelNames(colours=known, backgrounds=others)
    raise UserError(f"{path} {_what_is_wrong(content, backgrounds, numbers, colours)}; it must {RULE}")


def _what_is_wrong(
    content: Mapping[str, Any],
    backgrounds: Sequence[Any],
    numbers: Mapping[str, tuple[int, ...]],
    colours: Mapping[str, Colour | None],
) -> str:
    """Describes the first invalid entry."""
    if not content:
        return "gives no label but the background"
    for name, value in content.items():
        if not numbers[name] and not colours[name]:
            return f"gives {name!r} the value {shortened(value)}"
        if colours[name] == (0, 0, 0):
            return f"gives {name!r} the colour black, which is background"
    for name, value in content.items():
        like = [other for other in content if (numbers[other], colours[other]) == (numbers[name], colours[name])]
        if len(like) > 1:
            return f"gives {like[0]!r} and {like[1]!r} one value, {shortened(value)}"
    if all(numbers.values()):
        other = next(value for value in backgrounds if value not in (0, [0]))
        return f"gives the background the value {shortened(other)}"
    first = next(name for name in content if not numbers[name])
    second = next((name for name in content if numbers[name]), first)
    return f"gives {first!r} a colour and {second!r} a number"


def _as_numbers(value: object) -> tuple[int, ...]:
    """Parses a positive integer, or nnU-Net's list of them for a region. Returns nothing for other values.

    Three numbers are a colour, unless all are below `DARKEST_COLOUR`: such a colour would look black.
    """
    entries = value if isinstance(value, list) else [value]
    numbers = tuple(part for part in entries if type(part) is int and part > 0)
    is_colour = len(numbers) == 3 and max(numbers) >= DARKEST_COLOUR
    return () if is_colour or len(numbers) < len(entries) else numbers


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(name for name in names if names.count(name) > 1)!r} twice")
    return content
