"""Registries of methods, datasets and backbones: values by name, imported lazily, open to other packages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from sam_medical.common.errors import UserError, first_line
from sam_medical.common.values import shortened

T = TypeVar("T")

# At least two characters before the colon: one is a drive on Windows.
PLACE = re.compile(r"[A-Za-z_][\w.]+:[A-Za-z_]\w*")
MODULE = re.compile(r"[A-Za-z_][\w.]*")
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
        """Returns the value of a name that the user has typed, which may be a place outside this package.

        Raises:
            UserError: if there is none, its module cannot be imported, or it is not of this kind.
        """
        if name not in self and is_place(name):
            module, _, attribute = name.partition(":")
            loaded = import_typed(module, f"the {self.kind} {name!r}")
            if not hasattr(loaded, attribute):
                raise UserError(f"the {self.kind} {name!r} does not exist: {loaded.__file__} has no {attribute}.")
            self._values[name] = self._checked(getattr(loaded, attribute), name)
        if name not in self:
            raise UserError(self.unknown(name))
        return self[name]

    def unknown(self, name: str) -> str:
        """Returns the error message for an unknown name."""
        module, _, attribute = name.partition(":")
        if is_place(name) and module in EXTENSIONS:
            return f"the {self.kind} {name!r} does not exist: {sys.modules[module].__file__} has no {attribute}."
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
            module, _, attribute = self._places.get(name, name).partition(":")
            self._values[name] = self._checked(getattr(import_module(module), attribute), name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._values or (isinstance(name, str) and self._is_in_extension(name))

    def _checked(self, value: Any, name: str) -> T:
        """Raises a `UserError` if a value is not of this kind, or a class that is not finished."""
        if not self._can_be(value):
            raise UserError(f"{name!r} is no {self.kind}, but {type(value).__name__}; give one.")
        if missing := sorted(getattr(value, "__abstractmethods__", ())):
            raise UserError(f"the {self.kind} {name!r} lacks {', '.join(missing)}; write them.")
        return value

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
    for module in modules:
        if not MODULE.fullmatch(module):
            raise UserError(f"extensions names {shortened(module)}; give the name of a module, such as my_module.")
        import_typed(module, f"extensions names {shortened(module)}, which")
        EXTENSIONS.add(module)


def import_typed(name: str, what: str) -> ModuleType:
    """Imports a module that the user has named on the command line, also from the current folder.

    The folder stays on the import path only if the module is in it: other folders, such as one of images, must not
    provide modules. Python's option ``-P`` keeps it off the path.

    Args:
        name: The module.
        what: The beginning of the error message.

    Raises:
        UserError: if the module cannot be imported, or is a folder without code.
    """
    folder = os.getcwd()
    is_added = not {folder, ""} & set(sys.path) and not getattr(sys.flags, "safe_path", False)
    if is_added:
        sys.path.append(folder)
    is_here = False
    try:
        module = import_module(name)
        is_here = module.__file__ is not None and Path(module.__file__).is_relative_to(folder)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise UserError(f"{what} cannot be imported ({reason}).") from error
    finally:
        if is_added and not is_here:
            sys.path.remove(folder)
    if module.__file__ is None:
        raise UserError(f"{what} is a folder without code ({next(iter(module.__path__))}); rename one of the two.")
    return module
