"""Registries of methods, datasets and backbones: values by name, imported lazily, open to other packages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from sam_medical.common.errors import UserError, first_line
from sam_medical.common.values import shortened

T = TypeVar("T")

PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Modules that the user has given with --extensions.
EXTENSIONS: set[str] = set()


def is_place(name: str) -> bool:
    """Whether a name has the form ``package.module:NAME``."""
    return PLACE.fullmatch(name) is not None


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to values, in a fixed order. Listing the names imports nothing.

    ``package.module:NAME`` is a valid name too. Only `find` imports such a module, and only for names that the user
    has typed: a name from a file must not choose code to run. The modules of ``--extensions`` are trusted, so their
    values are found like any other.

    Args:
        kind: The kind of value in the singular, for messages.
        places: The location ``package.module:NAME`` of each named value.
        has: An attribute that every value of this kind has.
    """

    def __init__(self, kind: str, places: Mapping[str, str], has: str = "") -> None:
        self.kind = kind
        self.has = has
        self._places = dict(places)
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Adds a value under a new name.

        Raises:
            ValueError: if the name belongs to another value.
        """
        if name in self and self[name] is not value:
            raise ValueError(f"there is a {self.kind} {name!r} already")
        self._values[name] = value
        return value

    def find(self, name: str) -> T:
        """Returns the value of a name that the user has typed. ``package.module:NAME`` is imported.

        Raises:
            UserError: if there is no such value, or its module cannot be imported.
        """
        if name not in self and is_place(name):
            value = _import(name, self.kind)
            if not self._can_be(value):
                raise UserError(f"{name!r} is no {self.kind}, but {type(value).__name__}; give one.")
            self._values[name] = value
        if name not in self:
            raise UserError(self.unknown(name))
        return self[name]

    def unknown(self, name: str) -> str:
        """Returns the error message for an unknown name."""
        module, _, _ = name.partition(":")
        if is_place(name):
            return (
                f"the {self.kind} {name!r} is not part of this package, and a file's name imports nothing; if you "
                f"trust its code, give --extensions {module}."
            )
        return f"unknown {self.kind} {name!r}; choose from {', '.join(self)}, or give package.module:NAME."

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            if name not in self:
                raise KeyError(name)
            self._values[name] = _import(self._places.get(name, name), self.kind)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._values or (isinstance(name, str) and self._is_in_extension(name))

    def _is_in_extension(self, name: str) -> bool:
        module, _, rest = name.partition(":")
        value = getattr(sys.modules[module], rest, None) if rest and module in EXTENSIONS else None
        return value is not None and self._can_be(value)

    def _can_be(self, value: Any) -> bool:
        return not self.has or hasattr(value, self.has)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._values]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def import_extensions(modules: Iterable[str]) -> None:
    """Imports the modules of ``--extensions``, which may register datasets, methods and backbones.

    Raises:
        UserError: if a module cannot be imported.
    """
    _look_here()
    for module in modules:
        try:
            import_module(module)
        except (ImportError, ValueError, OSError) as error:
            name, reason = shortened(module), first_line(error)[:200]
            raise UserError(f"extensions names {name}, which cannot be imported ({reason}).") from error
        EXTENSIONS.add(module)


def _look_here() -> None:
    """Adds the current folder to the import path. The console script `sam-medical` does not have it there."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _import(place: str, kind: str) -> Any:
    module, _, name = place.partition(":")
    _look_here()
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the {kind} {place!r} cannot be imported ({first_line(error)}).") from error
