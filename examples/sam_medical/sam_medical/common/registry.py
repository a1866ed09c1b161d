"""Things that options name, such as methods: found by name, imported when needed, and open to other packages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from sam_medical.common.errors import UserError, first_line

T = TypeVar("T")

PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_place(name: str) -> bool:
    """Whether a name has the form ``package.module:NAME``."""
    return PLACE.fullmatch(name) is not None


class Registry(Mapping[str, T], Generic[T]):
    """Values by name, in a fixed order. Listing the names imports nothing.

    A value may also be named by its place, ``package.module:NAME``. Only `find` imports such a module, because it is
    for names that the user has typed: a name that was read from a file must not choose code that is run.

    Args:
        kind: What the values are, in the singular, as messages say it.
        places: For each name the place of its value, ``package.module:NAME``.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Adds a value under a name of its own.

        Raises:
            ValueError: if another value has that name.
        """
        if name in self and self[name] is not value:
            raise ValueError(f"there is a {self.kind} {name!r} already")
        self._values[name] = value
        return value

    def find(self, name: str) -> T:
        """The value of a name that the user has given, which may be a place outside this package.

        Raises:
            UserError: if there is none, or its module cannot be imported.
        """
        if name not in self and is_place(name):
            self._values[name] = _import(name, self.kind)
        if name not in self:
            raise UserError(
                f"unknown {self.kind} {name!r}; choose from {', '.join(self)}, or give package.module:NAME."
            )
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            self._values[name] = _import(self._places[name], self.kind)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._values]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _import(place: str, kind: str) -> Any:
    module, _, name = place.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # `sam-medical` is a script elsewhere, and users' modules are mostly here
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the {kind} {place!r} cannot be imported ({first_line(error)}).") from error
