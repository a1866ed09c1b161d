"""Parses options from the command line and a YAML file into a dataclass, whose fields are the flags and keys.

The parser is argparse. transformers has a parser for dataclasses, but its import would slow down ``--help``.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from sam_medical.common.errors import UserError
from sam_medical.common.registry import Registry, import_extensions, is_place
from sam_medical.common.values import shortened
from sam_medical.options.checks import check_values

PACKAGE = Path(__file__).parents[1]
T = TypeVar("T")

LARGEST_CONFIG = 2**20  # bytes
LONGEST_MESSAGE = 500
PLAIN = (str, int, float, bool, date, type(None))
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
# Options that import code. They are accepted on the command line only.
TYPED_ONLY = ("extensions",)


def parse_options(options_type: type[T], arguments: list[str] | None = None) -> T:
    """Parses options. The command line overrides the YAML file of ``--config``, which overrides the defaults.

    The modules of ``--extensions`` and of every ``package.module:NAME`` on the command line are imported before the
    options are checked. Names in a file import nothing.

    Args:
        options_type: The dataclass of the options.
        arguments: The arguments; None for those of the process.

    Raises:
        UserError: if a flag or key is unknown, or a value has the wrong type or is out of range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(options_type)
    typed = vars(parser.parse_known_args(arguments)[0])
    if typed["config"] is not None:
        parser.set_defaults(**_read_yaml(_config_path(typed["config"]), options_type, parser))
    namespace = vars(parser.parse_args(arguments))
    namespace.pop("config")
    import_extensions(typed.get("extensions") or [])
    for f in fields(cast(Any, options_type)):
        registry: Registry | None = f.metadata.get("registry")
        if registry is not None and typed[f.name] is not None:
            for name in typed[f.name].split(","):
                if is_place(name.strip()):
                    registry.find(name.strip())
    options = options_type(**namespace)
    check_values(options)
    return options


def flags_of(values: dict[str, Any]) -> list[str]:
    """Converts options to command-line arguments. Values of None are left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def changed_options(options: Any) -> dict[str, Any]:
    """Returns the options that differ from their defaults."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(type(options), name)}


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(
            f"{message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + '...'}; see --help."
        )


def _parser(options_type: type) -> _Parser:
    """Returns a parser with one flag per field, spelled with underscores or hyphens."""
    parser = _Parser(
        description=options_type.__doc__, allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(options_type)
    for f in fields(cast(Any, options_type)):
        spellings = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        parser.add_argument(
            *spellings, default=f.default, help=f.metadata.get("help"), **_argument_of(hints[f.name], f.name)
        )
    parser.add_argument(
        "--config", help="YAML file of options, or the name of a shipped one, such as demo. Flags override it."
    )
    return parser


def _argument_of(hint: Any, name: str) -> dict[str, Any]:
    """Returns the arguments of `add_argument` for a field's type."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    if get_origin(hint) is list:
        return {"type": get_args(hint)[0], "nargs": "+"}
    if get_origin(hint) is Literal:  # `check_values` checks the choice, with a clearer message
        return {"type": str, "metavar": f"{{{','.join(get_args(hint))}}}"}
    return {"type": hint}


def _true_or_false(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise ArgumentTypeError(f"{shortened(text)} is neither true nor false")
    return text.lower() in TRUE


class _Loader(yaml.SafeLoader):
    """A YAML loader without aliases, by which a few lines could expand to more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("it uses an alias (*), which options do not support")
        return super().compose_node(parent, index)


def _read_yaml(path: Path, options_type: type, parser: ArgumentParser) -> dict[str, Any]:
    """Reads the options of a file. Each one is checked and converted like a flag."""
    content = _load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines of the form `key: value`.")
    names = [f.name for f in fields(cast(Any, options_type)) if f.name not in TYPED_ONLY]
    for key in content:
        if key in TYPED_ONLY:
            raise UserError(f"{path}: {key} runs code, and is only taken from the command line; give --{key}.")
        if key not in names:
            raise UserError(f"{path} has the unknown key {shortened(key)}; the keys are {', '.join(names)}.")
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, PLAIN) for one in values) or (isinstance(value, list) and None in value):
            raise UserError(f"{path}: {key} must be one value or a list of values.")
    try:
        parsed = vars(parser.parse_args(flags_of(content)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {key: parsed[key] for key in content}


def _config_path(name: str) -> Path:
    """Returns the path of a file, or of a configuration of the package by its bare name."""
    shipped = [folder / f"{name}.yaml" for folder in (PACKAGE / "configs", PACKAGE.parent / "configs")]
    is_bare = re.fullmatch(r"[\w-]+", name) is not None and not Path(name).exists()
    return next((path for path in shipped if is_bare and path.is_file()), Path(name))


def _load_yaml(path: Path) -> Any:
    try:
        with path.expanduser().open("rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise UserError(f"{path} has more than {LARGEST_CONFIG} bytes; give a file of options.")
        return yaml.load(text.decode(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep; it must hold lines of the form `key: value`.") from error
    # PyYAML raises these errors for invalid dates and numbers.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:LONGEST_MESSAGE]}") from error
