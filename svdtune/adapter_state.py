"""Checks that an adapter fits its model: tensors by name, singular vectors by fingerprint."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.digests import PEFT_PREFIX
from svdtune.layer import SVDScaleShiftLayer
from svdtune.param_wrapper import ParamWrapper
from svdtune.spectrum import fingerprint_distance

# Training changes singular values by about a tenth. At this distance, W' is off by about 1e-4 of its norm.
FINGERPRINT_TOLERANCE = 1e-3


def check_values(model: nn.Module, adapter_name: str, config: SVDScaleShiftConfig, state: dict[str, Tensor]) -> None:
    """Checks that ``state`` has finite values for every tensor of the adapter, and no other tensors.

    Args:
        model: The model, after the adapter's layers were added.
        adapter_name: The adapter's name.
        config: The adapter's config.
        state: The tensors to load, by their names in the model.

    Warns:
        UserWarning: if ``state`` contains embeddings of the base model. PEFT saves them if the vocabulary was resized.

    Raises:
        ValueError: if tensors are missing, unknown, of the wrong dtype, or not finite. The message lists their names.
    """
    present = {_without_wrappers(key): tensor for key, tensor in model.state_dict().items()}
    given = {_without_wrappers(key): tensor for key, tensor in state.items()}
    adapter_keys = _adapter_keys(model, adapter_name)
    shown = {_without_wrappers(key): key for key in [*adapter_keys, *state]}
    values = {_without_wrappers(key) for key in adapter_keys}
    others = {_without_wrappers(key) for key in file_keys(model, adapter_name)} | _bias_keys(given, config)
    modules = embedding_names(model)
    embeddings = {key for key in given.keys() - values - others if is_inside(key, modules)}
    problems = {
        "are missing": values - given.keys(),
        "do not exist in this model": given.keys() - values - others - embeddings,
        "are not floating-point numbers": {
            key for key, value in given.items() if _is_unexpected_integer(value, present, key)
        },
        "hold NaN or infinite values": {key for key, value in given.items() if not _is_finite(value)},
    }
    for problem, names in problems.items():
        if names:
            listed = _listed(sorted(shown[name] for name in names))
            raise ValueError(
                f"The adapter {adapter_name!r} was not loaded: {len(names)} of its values {problem}, {listed}. Check "
                "that the base model, adapter_config.json and the weights belong together."
            )
    changing = [key for key in sorted(embeddings & present.keys()) if not is_same(given[key], present[key])]
    if changing:
        warnings.warn(
            f"The adapter {adapter_name!r} brings embeddings of its own, {_listed(changing)}. They replace "
            "those of the base model, even while the adapter is disabled.",
            stacklevel=2,
        )


def file_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Maps names in the model to names in the adapter's file, for ``modules_to_save`` and trained token rows."""
    return {
        f"{name}.{in_model}".lstrip("."): f"{name}.{in_file}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for in_file, in_model in module.adapter_state_dict_load_map(adapter_name).items()
    }


def fully_trained_tensors(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Selects the fully trained tensors of an adapter from a model's ``state``, by their names in the file."""
    in_file = file_keys(model, adapter_name)
    return {in_file[key]: state[key] for key in in_file.keys() & state.keys()}


def _adapter_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """The state dict keys of an adapter's a and B in all tuned layers."""
    return {
        f"{layer_name}.{attribute}.{adapter_name}.weight".lstrip(".")
        for layer_name, layer in model.named_modules()
        if isinstance(layer, SVDScaleShiftLayer)
        for attribute in layer.adapter_layer_names
        if adapter_name in getattr(layer, attribute)
    }


def _bias_keys(keys: Iterable[str], config: SVDScaleShiftConfig) -> set[str]:
    """The keys of biases that an adapter file may contain. A state dict passed in Python may contain any bias."""
    bias = config.bias if config.read_from_file else "all"
    ending = {"none": None, "all": "bias", "svd_scale_shift_only": "base_layer.bias"}[bias]
    return {key for key in keys if ending and (key == ending or key.endswith(f".{ending}"))}


def embedding_names(model: nn.Module) -> set[str]:
    """The names of a transformer's input and output embeddings."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not a transformers model, or without embeddings
            embeddings.append(getattr(model, getter)())
    found = [module for module in embeddings if isinstance(module, nn.Module)]
    names = {name for name, module in model.named_modules() if any(module is one for one in found)}
    return {_without_wrappers(f"{name}.").rstrip(".") for name in names}


def is_inside(key: str, modules: set[str]) -> bool:
    """Whether ``key`` belongs to one of the modules, or to the PEFT wrapper of one."""
    return any(key.startswith(f"{module}.") for module in modules)


def is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and not one.is_meta and torch.equal(one.to(other), other)


def _is_unexpected_integer(value: Tensor, present: dict[str, Tensor], key: str) -> bool:
    """Whether a tensor is an integer where the model has none. Counters, as in batch norm, are integers in both."""
    return not value.is_floating_point() and (key not in present or present[key].is_floating_point())


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


def _without_wrappers(key: str) -> str:
    """Removes the prefixes of FSDP, torch.compile and `PeftModel` from a state dict key."""
    return re.sub(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod)\.", "", key).removeprefix(PEFT_PREFIX)


def fingerprints_of(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """The fingerprint of each weight that an adapter tunes, by its name; see `Spectrum.fingerprint`."""
    return {
        name: layer.spectrum.fingerprint(layer.rank[adapter_name])
        for name, layer in _tuned_layers(model, adapter_name).items()
    }


def _tuned_layers(model: nn.Module, adapter_name: str) -> dict[str, SVDScaleShiftLayer]:
    return {
        _name_in_base_model(name, layer): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SVDScaleShiftLayer) and layer.has_adapter(adapter_name)
    }


def _name_in_base_model(name: str, layer: SVDScaleShiftLayer) -> str:
    name = re.sub(r"(^|\.)(base_model\.model|_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)", "", name).strip(".")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def check_fingerprints(model: nn.Module, adapter_name: str, config: SVDScaleShiftConfig) -> None:
    """Compares the model's singular vectors with those that the adapter was trained on.

    Args:
        model: The model, after the adapter's layers were added.
        adapter_name: The adapter's name.
        config: The adapter's config, with the saved fingerprints.

    Warns:
        UserWarning: if vectors differ, with the worst layer, or if no fingerprint can be compared.

    Raises:
        ValueError: if ``config.strict``, in place of the warning. Then a missing fingerprint or digest is an error
            too.
    """
    if not config.read_from_file and config.fingerprints is None:
        return
    layers, expected = _tuned_layers(model, adapter_name), config.fingerprints or {}
    comparable = {name for name in layers.keys() & expected.keys() if all(map(math.isfinite, expected[name]))}
    problem = _describe_missing_records(layers.keys(), comparable, config) or _describe_differing_vectors(
        {name: layers[name] for name in comparable}, expected, adapter_name
    )
    if problem is None:
        return
    if config.strict:
        raise ValueError(f"The adapter {adapter_name!r} {problem}")
    warnings.warn(f"The adapter {adapter_name!r} {problem}", stacklevel=2)


def _describe_missing_records(
    layers: Collection[str], comparable: set[str], config: SVDScaleShiftConfig
) -> str | None:
    """Describes missing fingerprints or digests. Without `strict`, it reports only that none can be compared."""
    expected = (config.fingerprints or {}).keys()
    missing = sorted((set(layers) ^ set(expected)) | (set(expected) - comparable))
    if config.strict and missing:
        return (
            f"cannot be checked, as `strict` asks for: fingerprints are missing, unknown or not numbers for "
            f"{_listed(missing)}. Load it without `strict` if you trust it, and save it again."
        )
    if config.strict and not config.digests:
        return (
            "cannot be checked, as `strict` asks for: its config has no `digests`. Load it without `strict` if you "
            "trust it, and save it again."
        )
    if expected and not comparable:
        return "cannot be compared with this model: it has no fingerprint of any layer that it tunes here."
    return None


def _describe_differing_vectors(
    layers: dict[str, SVDScaleShiftLayer], expected: dict[str, list[float]], adapter_name: str
) -> str | None:
    distances = {
        name: fingerprint_distance(layer.spectrum.fingerprint(layer.rank[adapter_name]), expected[name])
        for name, layer in layers.items()
    }
    differing = {name: distances[name] for name, layer in layers.items() if not distances[name] <= _tolerance(layer)}
    if not differing:
        return None
    worst = max(differing, key=lambda name: differing[name])
    return (
        f"was made for other weights: the singular vectors of {len(differing)} of "
        f"{len(distances)} layers differ, most in `{worst}`, where the effect of the same change differs by "
        f"{min(differing[worst], 1):.2%}. Its outputs will differ from those in training. Load it onto the base model "
        "that it was trained on, in the same precision and quantisation."
    )


def _tolerance(layer: SVDScaleShiftLayer) -> float:
    """The largest distance that rounding explains. It is about one rounding of the vectors' dtype in bfloat16."""
    return max(FINGERPRINT_TOLERANCE, 1.3 * torch.finfo(layer.spectrum.dtype).eps)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
