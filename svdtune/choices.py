"""Whether the values of a config are of the types and in the ranges that its fields take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from svdtune.expressions import check_expressions
from svdtune.spectrum import FINGERPRINT_LENGTH

NONLINEARITIES = ("relu", "none")
BIASES = ("none", "all", "svd_scale_shift_only")
SWITCHES = ("scale", "shift", "one_sided", "strict", "init_weights", "inference_mode")
# So many names a config may have whatever the model.
LEAST_NAMES = 100
# Compiling one takes up to a millisecond. A sum of adapters has one a layer.
MOST_EXPRESSIONS = 10_000
# Characters that make a name an expression. PEFT matches the names in `modules_to_save` as such.
OF_EXPRESSIONS = set("*+?()[]{}|^$\\")


def check_choices(config: Any) -> None:
    """Makes sure that a `SVDScaleShiftConfig` can be worked with.

    Raises:
        ValueError: with the name of the field, its value, and what it can be.
    """
    for name in SWITCHES:
        _require(isinstance(getattr(config, name), bool), name, config, "True or False")
    _require(config.nonlinearity in NONLINEARITIES, "nonlinearity", config, _listed(NONLINEARITIES))
    _require(config.bias in BIASES, "bias", config, _listed(BIASES))
    for name in ("base_model_name_or_path", "revision", "svd_cache"):
        value = getattr(config, name)
        is_text = isinstance(value, str) and "\0" not in value
        _require(value is None or is_text, name, config, "a string, or None")
    _check_targets(config)
    _check_layers(config)
    _check_ranks(config)
    _check_trained_whole(config)
    _check_records(config)
    if not (config.scale or config.shift):
        raise ValueError("Nothing would learn: `scale` and `shift` cannot both be False.")


def expressions_of(config: Any) -> dict[str, str]:
    """The regular expressions of a config, written as PEFT matches them, by what they are called in messages."""
    expressions = {
        f"`{name}`": value
        for name in ("target_modules", "exclude_modules")
        if isinstance(value := getattr(config, name), str)
    }
    expressions |= {f"`rank_pattern[{key!r}]`": rf"(.*\.)?({key})$" for key in config.rank_pattern}
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    return expressions | {f"`layers_pattern` {pattern!r}": rf"(?:^|.*?\.){pattern}\.\d+\." for pattern in patterns}


def _check_targets(config: Any) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        can_be = value is None or isinstance(value, str) or _is_names(value, (list, tuple, set, frozenset))
        _require(can_be, name, config, "a list of names, a regular expression, or None")
    parameters = config.target_parameters
    can_be = parameters is None or _is_names(parameters, (list, tuple, set))
    _require(can_be, "target_parameters", config, "a list of names, or None")


def _check_layers(config: Any) -> None:
    indices = config.layers_to_transform
    can_be = indices is None or _is_index(indices) or (isinstance(indices, list) and all(map(_is_index, indices)))
    _require(can_be, "layers_to_transform", config, "a number from 0 up, a list of them, or None")
    pattern = config.layers_pattern
    can_be = pattern is None or isinstance(pattern, str) or _is_names(pattern, (list,))
    _require(can_be, "layers_pattern", config, "a name, a list of names, or None")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError("`layers_to_transform` needs `target_modules` as a list of names, not as a string.")
    if isinstance(config.target_modules, str) and config.layers_pattern is not None:
        raise ValueError("`layers_pattern` needs `target_modules` as a list of names, not as a string.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("`layers_pattern` does nothing without `layers_to_transform`: give both or neither.")


def _check_ranks(config: Any) -> None:
    pattern = config.rank_pattern
    is_pattern = isinstance(pattern, Mapping) and all(isinstance(key, str) for key in pattern)
    _require(is_pattern, "rank_pattern", config, "a dictionary of regular expressions to ranks")
    if len(pattern) > MOST_EXPRESSIONS:
        raise ValueError(f"`rank_pattern` has {len(pattern)} entries; it can have up to {MOST_EXPRESSIONS}.")
    check_expressions(expressions_of(config))
    for name, rank in {
        "rank": config.rank,
        **{f"rank_pattern[{key!r}]": value for key, value in pattern.items()},
    }.items():
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        fraction = isinstance(rank, float) and 0 < rank <= 1
        if not (rank is None or whole or fraction):
            raise ValueError(
                f"`{name}` is {_shown(rank)}; it can be a number from 1 up, a fraction in (0.0, 1.0], or None for all."
            )


def _check_trained_whole(config: Any) -> None:
    modules = config.modules_to_save
    can_be = modules is None or _is_names(modules, (list, tuple, set))
    can_be = can_be and not any(OF_EXPRESSIONS & set(name) for name in modules or ())
    _require(can_be, "modules_to_save", config, "a list of modules' names, or None")
    tokens = config.trainable_token_indices
    lists: Any = tokens.values() if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
    named = not isinstance(tokens, Mapping) or all(isinstance(name, str) and name for name in tokens)
    can_be = named and all(isinstance(rows, (list, tuple)) and all(map(_is_index, rows)) for rows in lists)
    _require(can_be, "trainable_token_indices", config, "a list of rows from 0 up, a dictionary of lists, or None")


def check_counts(config: Any, model: nn.Module) -> None:
    """Makes sure that a config from a file names no more modules than there are; PEFT takes long over longer lists.

    Raises:
        ValueError: with the name of the field.
    """
    things = sum(1 for _ in model.modules()) + sum(1 for _ in model.parameters())
    most = max(LEAST_NAMES, things)
    fields = (
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "modules_to_save",
        "layers_pattern",
        "rank_pattern",
    )
    for name in fields:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str) and len(value) > most:
            raise ValueError(f"`{name}` has {len(value)} entries, but this model has {things} modules and parameters.")


def check_token_rows(config: Any, model: nn.Module) -> None:
    """Makes sure that the embeddings have the rows that ``trainable_token_indices`` names.

    Raises:
        ValueError: with the embedding's name and its number of rows, if one has fewer.
    """
    tokens = config.trainable_token_indices or {}
    if not isinstance(tokens, Mapping):
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        found = {} if embeddings is None else {"the input embeddings": (embeddings, tokens)}
    else:
        found = {
            f"`{name}`": (module, rows)
            for target, rows in tokens.items()
            for name, module in model.named_modules()
            if name == target or name.endswith(f".{target}")
        }
    for name, (module, rows) in found.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim and any(row >= len(weight) for row in rows):
            raise ValueError(
                f"`trainable_token_indices` names row {max(rows)}, but {name} has {len(weight)} rows, counted from 0."
            )


def _check_records(config: Any) -> None:
    """What a file says of itself. NaN is no fingerprint, but is refused only where it is compared."""
    fingerprints, digests = config.fingerprints, config.digests
    can_be = fingerprints is None or (
        isinstance(fingerprints, Mapping) and all(map(_is_fingerprint, fingerprints.values()))
    )
    _require(can_be, "fingerprints", config, f"a dictionary of lists of {FINGERPRINT_LENGTH} numbers, or None")
    can_be = digests is None or (
        isinstance(digests, Mapping) and all(isinstance(digest, str) for digest in digests.values())
    )
    _require(can_be, "digests", config, "a dictionary of strings, or None")


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, list) and len(value) == FINGERPRINT_LENGTH and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (abs(value) < 1e300 or value != value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_names(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and all(isinstance(name, str) and name for name in cast(Iterable[Any], value))


def _require(holds: bool, name: str, config: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` is {_shown(getattr(config, name))}; it can be {rule}.")


def _shown(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(map(repr, choices))
