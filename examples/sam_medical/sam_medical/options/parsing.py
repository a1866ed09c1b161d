"""Options from the command line and a YAML file: a dataclass's fields are the flags and the file's keys.

The parser is argparse's. transformers has one for dataclasses too, but its import takes longer than help may.
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
# Options that import code, and so are taken from the command line alone.
TYPED_ONLY = ("extensions",)


def parse_options(options_type: type[T], arguments: list[str] | None = None) -> T:
    """Options from the command line, over those of the YAML file that ``--config`` names, over the defaults.

    Before the options are checked, the modules of ``--extensions`` are imported, and so is the module of every
    ``package.module:NAME`` on the command line. No name in a file imports anything.

    Raises:
        UserError: for a flag or key that does not exist, or a value that is not of its type or range.
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
    """Option names and values as the command line takes them; None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def changed_options(options: Any) -> dict[str, Any]:
    """The options that are not at their defaults."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(type(options), name)}


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(
            f"{message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + '...'}; see --help."
        )


def _parser(options_type: type) -> _Parser:
    """A parser with a flag for each field, spelled with underscores or hyphens."""
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
        "--config", help="YAML file of these options, or the name of one that is shipped, as demo; flags override it."
    )
    return parser


def _argument_of(hint: Any, name: str) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    if get_origin(hint) is list:
        return {"type": get_args(hint)[0], "nargs": "+"}
    if get_origin(hint) is Literal:  # which `check_values` checks, so that messages name the option and its value
        return {"type": str, "metavar": f"{{{','.join(get_args(hint))}}}"}
    return {"type": hint}


def _true_or_false(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise ArgumentTypeError(f"{shortened(text)} is neither true nor false")
    return text.lower() in TRUE


class _Loader(yaml.SafeLoader):
    """YAML without references, by which a few lines can stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("it refers to another place in the file with *, which options have no use for")
        return super().compose_node(parent, index)


def _read_yaml(path: Path, options_type: type, parser: ArgumentParser) -> dict[str, Any]:
    """The file's options, each checked and converted as if it had been given as a flag."""
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
    """A file, or by its bare name one of the configurations that come with the package."""
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
    # Values that look like a date or a number and are none end in errors of Python's own.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:LONGEST_MESSAGE]}") from error
