"""Whether an adapter fits the model that it is loaded into: its values by name, its vectors by fingerprint."""

from __future__ import annotations

import re
import warnings

from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.kinds import ParamWrapper
from svdtune.layer import SVDScaleShiftLayer
from svdtune.spectrum import fingerprint_distance

# Changes of the singular values are a tenth of them or so: at this distance W' is off by about 1e-4 of its norm.
FINGERPRINT_TOLERANCE = 1e-3


def check_values(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Makes sure that ``state_dict`` has a finite value for all that the adapter learns, and nothing else of ours.

    Raises:
        ValueError: with the names, if values are missing, left over, or not finite.
    """
    expected = _names_of_values(model, adapter_name)
    given = {key for key in state_dict if f".{prefix}" in key or key.startswith(prefix)}
    problems = {
        "are missing": expected - given,
        "fit no tuned layer of this model": given - expected,
        "hold NaN or infinite values": {
            key for key in given if not state_dict[key].is_meta and not state_dict[key].isfinite().all()
        },
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"The adapter {adapter_name!r} was not loaded: {len(names)} of its values {problem}, "
                f"{_listed(sorted(names))}. Check that base model, adapter_config.json and weights belong together."
            )


def _names_of_values(model: nn.Module, adapter_name: str) -> set[str]:
    """What A and B of an adapter are called in the model's state dict, in every tuned layer."""
    return {
        f"{layer_name}.{attribute}.{adapter_name}".lstrip(".")
        for layer_name, layer in model.named_modules()
        if isinstance(layer, SVDScaleShiftLayer)
        for attribute in layer.adapter_layer_names
        if adapter_name in getattr(layer, attribute)
    }


def fingerprints_of(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """What each weight that an adapter tunes answers to fixed changes of its singular values, by its name."""
    return {
        _name_in_base_model(name, layer): layer.spectrum.fingerprint(layer.rank[adapter_name])
        for name, layer in model.named_modules()
        if isinstance(layer, SVDScaleShiftLayer) and layer.has_adapter(adapter_name)
    }


def _name_in_base_model(name: str, layer: SVDScaleShiftLayer) -> str:
    name = re.sub(r"(^|\.)(base_model\.model|_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)", "", name).strip(".")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def check_fingerprints(adapter_name: str, config: SVDScaleShiftConfig, present: dict[str, list[float]]) -> None:
    """Compares the singular vectors that an adapter was made for with those of the model that it is loaded into.

    Args:
        adapter_name: The adapter's name.
        config: Its config, which may hold the fingerprints of what it was made for.
        present: The fingerprints of the model (`fingerprints_of`).

    Warns:
        UserWarning: with the worst layer, if they differ.

    Raises:
        ValueError: instead, if ``config.strict``.
    """
    distances = {
        name: fingerprint_distance(present[name], made_for)
        for name, made_for in (config.fingerprints or {}).items()
        if name in present
    }
    differing = {name: distance for name, distance in distances.items() if not distance <= FINGERPRINT_TOLERANCE}
    if not differing:
        return
    worst = max(differing, key=lambda name: differing[name])
    message = (
        f"The adapter {adapter_name!r} was made for other weights: the singular vectors of {len(differing)} of "
        f"{len(distances)} layers differ, most in `{worst}`, where a change of the singular values does "
        f"{min(differing[worst], 1):.2%} something else. It will not act here as it was trained to. Load it onto the "
        "base model that it was trained on, in the same precision and quantisation."
    )
    if config.strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
