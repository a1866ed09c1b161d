"""Validates the types and ranges of a config's fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from svdtune.expressions import check_expressions
from svdtune.spectrum import FINGERPRINT_LENGTH

NONLINEARITIES = ("relu", "none")
BIASES = ("none", "all", "svd_scale_shift_only")
SWITCHES = ("scale", "shift", "one_sided", "strict", "init_weights", "inference_mode")
# A config may have this many names, however small the model is.
ALWAYS_ALLOWED = 100
# Compiling an expression takes up to a millisecond. A sum of adapters has one expression per layer.
MAX_EXPRESSIONS = 10_000
# Characters with a meaning in regular expressions. PEFT matches the names in `modules_to_save` as expressions.
EXPRESSION_CHARACTERS = set("*+?()[]{}|^$\\")


def check_choices(config: Any) -> None:
    """Validates all fields of a `SVDScaleShiftConfig`.

    Raises:
        ValueError: if a field is invalid. The message gives its name, its value and the allowed values.
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
    _check_fully_trained(config)
    _check_records(config)
    if not (config.scale or config.shift):
        raise ValueError("Nothing would learn: `scale` and `shift` cannot both be False. Set one of them to True.")


def expressions_of(config: Any) -> dict[str, str]:
    """The regular expressions of a config, in the form that PEFT matches, by their names in error messages."""
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
        is_valid = value is None or isinstance(value, str) or _are_names(value, (list, tuple, set, frozenset))
        _require(is_valid, name, config, "a list of names, a regular expression, or None")
    parameters = config.target_parameters
    is_valid = parameters is None or _are_names(parameters, (list, tuple, set))
    _require(is_valid, "target_parameters", config, "a list of names, or None")


def _check_layers(config: Any) -> None:
    indices = config.layers_to_transform
    is_valid = indices is None or _is_index(indices) or (isinstance(indices, list) and all(map(_is_index, indices)))
    _require(is_valid, "layers_to_transform", config, "a number from 0 up, a list of them, or None")
    pattern = config.layers_pattern
    is_valid = pattern is None or isinstance(pattern, str) or _are_names(pattern, (list,))
    _require(is_valid, "layers_pattern", config, "a name, a list of names, or None")
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
    if len(pattern) > MAX_EXPRESSIONS:
        raise ValueError(f"`rank_pattern` has {len(pattern)} entries; it can have up to {MAX_EXPRESSIONS}.")
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


def _check_fully_trained(config: Any) -> None:
    modules = config.modules_to_save
    is_valid = modules is None or _are_names(modules, (list, tuple, set))
    is_valid = is_valid and not any(EXPRESSION_CHARACTERS & set(name) for name in modules or ())
    _require(is_valid, "modules_to_save", config, "a list of modules' names, or None")
    tokens = config.trainable_token_indices
    lists: Any = tokens.values() if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
    named = not isinstance(tokens, Mapping) or all(isinstance(name, str) and name for name in tokens)
    is_valid = named and all(isinstance(rows, (list, tuple)) and all(map(_is_index, rows)) for rows in lists)
    _require(is_valid, "trainable_token_indices", config, "a list of rows from 0 up, a dictionary of lists, or None")


def check_counts(config: Any, model: nn.Module) -> None:
    """Checks that a config from a file does not name more modules than the model has.

    PEFT's matching is slow for long lists, so a hostile file could keep the process busy.

    Raises:
        ValueError: if a list is too long. The message names the field.
    """
    available = sum(1 for _ in model.modules()) + sum(1 for _ in model.parameters())
    limit = max(ALWAYS_ALLOWED, available)
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
        if value is not None and not isinstance(value, str) and len(value) > limit:
            raise ValueError(
                f"`{name}` has {len(value)} entries, but this model has {available} modules and parameters."
            )


def check_token_rows(config: Any, model: nn.Module) -> None:
    """Checks that the embeddings have all rows in ``trainable_token_indices``.

    Raises:
        ValueError: if a row does not exist. The message names the embedding and its number of rows.
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
    """Checks fingerprints and digests. NaN is allowed here, because `check_fingerprints` handles it."""
    fingerprints, digests = config.fingerprints, config.digests
    is_valid = fingerprints is None or (
        isinstance(fingerprints, Mapping) and all(map(_is_fingerprint, fingerprints.values()))
    )
    _require(is_valid, "fingerprints", config, f"a dictionary of lists of {FINGERPRINT_LENGTH} numbers, or None")
    is_valid = digests is None or (
        isinstance(digests, Mapping) and all(isinstance(digest, str) for digest in digests.values())
    )
    _require(is_valid, "digests", config, "a dictionary of strings, or None")


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, list) and len(value) == FINGERPRINT_LENGTH and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (abs(value) < 1e300 or value != value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_names(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and all(isinstance(name, str) and name for name in cast(Iterable[Any], value))


def _require(holds: bool, name: str, config: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` is {_shown(getattr(config, name))}; it can be {rule}.")


def _shown(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(map(repr, choices))
