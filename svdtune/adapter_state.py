"""Whether an adapter fits the model that it is loaded into: its values by name, its vectors by fingerprint."""

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

# Changes of the singular values are a tenth of them or so: at this distance W' is off by about 1e-4 of its norm.
FINGERPRINT_TOLERANCE = 1e-3


def check_values(model: nn.Module, adapter_name: str, config: SVDScaleShiftConfig, state: dict[str, Tensor]) -> None:
    """Makes sure that ``state`` has finite values for all that the adapter learns, and for nothing else.

    Args:
        model: The model, into which the adapter's layers are put already.
        adapter_name: The adapter's name.
        config: Its config.
        state: What was read, tensors by their names in the model.

    Warns:
        UserWarning: if it brings embeddings of the base model, as PEFT saves them where a vocabulary was resized.

    Raises:
        ValueError: with the names, if values are missing, additional, of another kind, or not finite.
    """
    present = {_without_wrapper(key): tensor for key, tensor in model.state_dict().items()}
    given = {_without_wrapper(key): tensor for key, tensor in state.items()}
    names_of_values = _names_of_values(model, adapter_name)
    shown = {_without_wrapper(key): key for key in [*names_of_values, *state]}
    values = {_without_wrapper(key) for key in names_of_values}
    others = {_without_wrapper(key) for key in names_in_file(model, adapter_name)} | _names_of_biases(given, config)
    modules = embedding_modules(model)
    embeddings = {key for key in given.keys() - values - others if is_below(key, modules)}
    problems = {
        "are missing": values - given.keys(),
        "have no place in this model": given.keys() - values - others - embeddings,
        "are not floating-point numbers": {
            key for key, value in given.items() if _is_of_another_kind(value, present, key)
        },
        "hold NaN or infinite values": {key for key, value in given.items() if not _is_finite(value)},
    }
    for problem, names in problems.items():
        if names:
            listed = _listed(sorted(shown[name] for name in names))
            raise ValueError(
                f"The adapter {adapter_name!r} was not loaded: {len(names)} of its values {problem}, {listed}. Check "
                "that base model, adapter_config.json and weights belong together."
            )
    changing = [key for key in sorted(embeddings & present.keys()) if not is_same(given[key], present[key])]
    if changing:
        warnings.warn(
            f"The adapter {adapter_name!r} brings embeddings of its own, {_listed(changing)}. They replace "
            "the base model's, also where the adapter is disabled.",
            stacklevel=2,
        )


def names_in_file(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Of what an adapter trains whole (``modules_to_save``, token rows): names in the model to names in its file."""
    return {
        f"{name}.{in_model}".lstrip("."): f"{name}.{in_file}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for in_file, in_model in module.adapter_state_dict_load_map(adapter_name).items()
    }


def tensors_trained_whole(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a model's ``state`` an adapter has trained whole, by its names in the adapter's file."""
    in_file = names_in_file(model, adapter_name)
    return {in_file[key]: state[key] for key in in_file.keys() & state.keys()}


def _names_of_values(model: nn.Module, adapter_name: str) -> set[str]:
    """What a and B of an adapter are called in the model's state dict, in every tuned layer."""
    return {
        f"{layer_name}.{attribute}.{adapter_name}.weight".lstrip(".")
        for layer_name, layer in model.named_modules()
        if isinstance(layer, SVDScaleShiftLayer)
        for attribute in layer.adapter_layer_names
        if adapter_name in getattr(layer, attribute)
    }


def _names_of_biases(keys: Iterable[str], config: SVDScaleShiftConfig) -> set[str]:
    """The biases that an adapter file may bring. A state dict that is set in Python may bring any, as with LoRA."""
    bias = config.bias if config.read_from_file else "all"
    ending = {"none": None, "all": "bias", "svd_scale_shift_only": "base_layer.bias"}[bias]
    return {key for key in keys if ending and (key == ending or key.endswith(f".{ending}"))}


def embedding_modules(model: nn.Module) -> set[str]:
    """The names of the modules that a transformer calls its input and output embeddings."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not a model of transformers, or one without
            embeddings.append(getattr(model, getter)())
    found = [module for module in embeddings if isinstance(module, nn.Module)]
    names = {name for name, module in model.named_modules() if any(module is one for one in found)}
    return {_without_wrapper(f"{name}.").rstrip(".") for name in names}


def is_below(key: str, modules: set[str]) -> bool:
    """Whether a tensor's name is of one of the modules, or of what PEFT has put into its place."""
    return any(key.startswith(f"{module}.") for module in modules)


def is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and not one.is_meta and torch.equal(one.to(other), other)


def _is_of_another_kind(value: Tensor, present: dict[str, Tensor], key: str) -> bool:
    """Counters of a module that is trained whole, such as a batch norm's, are integers in both."""
    return not value.is_floating_point() and (key not in present or present[key].is_floating_point())


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


def _without_wrapper(key: str) -> str:
    """A key of a state dict without what FSDP, torch.compile and PEFT's own model have put before its parts."""
    return re.sub(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod)\.", "", key).removeprefix(PEFT_PREFIX)


def fingerprints_of(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """What each weight that an adapter tunes answers to fixed changes of its singular values, by its name."""
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
    """Compares the singular vectors that an adapter was made for with those of the model that it is loaded into.

    Args:
        model: The model, into which the adapter's layers are put already.
        adapter_name: The adapter's name.
        config: Its config, which may hold the fingerprints of what it was made for.

    Warns:
        UserWarning: with the worst layer, if they differ, or if none of them can be compared.

    Raises:
        ValueError: instead, if ``config.strict``; then also if the fingerprint of a layer, or the digest of a tensor,
            is not there to be compared.
    """
    if not config.read_from_file and config.fingerprints is None:
        return
    layers, made_for = _tuned_layers(model, adapter_name), config.fingerprints or {}
    comparable = {name for name in layers.keys() & made_for.keys() if all(map(math.isfinite, made_for[name]))}
    problem = _problem_of_records(layers.keys(), comparable, config) or _problem_of_vectors(
        {name: layers[name] for name in comparable}, made_for, adapter_name
    )
    if problem is None:
        return
    if config.strict:
        raise ValueError(f"The adapter {adapter_name!r} {problem}")
    warnings.warn(f"The adapter {adapter_name!r} {problem}", stacklevel=2)


def _problem_of_records(layers: Collection[str], comparable: set[str], config: SVDScaleShiftConfig) -> str | None:
    """What is missing in order to tell whether the adapter fits; without `strict`, where nothing at all is there."""
    made_for = (config.fingerprints or {}).keys()
    missing = sorted((set(layers) ^ set(made_for)) | (set(made_for) - comparable))
    if config.strict and missing:
        return (
            f"cannot be checked, as `strict` asks for: fingerprints are missing, unknown or no numbers for "
            f"{_listed(missing)}. Load it without `strict` if you trust it, and save it again."
        )
    if config.strict and not config.digests:
        return (
            "cannot be checked, as `strict` asks for: its config has no `digests`. Load it without `strict` if you "
            "trust it, and save it again."
        )
    if made_for and not comparable:
        return "cannot be compared with this model: none of its fingerprints is of a layer that it tunes here."
    return None


def _problem_of_vectors(
    layers: dict[str, SVDScaleShiftLayer], made_for: dict[str, list[float]], adapter_name: str
) -> str | None:
    distances = {
        name: fingerprint_distance(layer.spectrum.fingerprint(layer.rank[adapter_name]), made_for[name])
        for name, layer in layers.items()
    }
    differing = {name: distances[name] for name, layer in layers.items() if not distances[name] <= _tolerance(layer)}
    if not differing:
        return None
    worst = max(differing, key=lambda name: differing[name])
    return (
        f"was made for other weights: the singular vectors of {len(differing)} of "
        f"{len(distances)} layers differ, most in `{worst}`, where a change of the singular values does "
        f"{min(differing[worst], 1):.2%} something else. It will not act here as it was trained to. Load it onto the "
        "base model that it was trained on, in the same precision and quantisation."
    )


def _tolerance(layer: SVDScaleShiftLayer) -> float:
    """Vectors in bfloat16 answer by their rounding apart, also where one side alone is held."""
    return max(FINGERPRINT_TOLERANCE, 1.3 * torch.finfo(layer.spectrum.dtype).eps)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
