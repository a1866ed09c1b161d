"""Replaces the values of a loaded adapter in place."""

from __future__ import annotations

from typing import Any

from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from svdtune.adapter_state import check_fingerprints, embedding_names, is_inside, is_same
from svdtune.config import SEMANTIC_FIELDS, SVDScaleShiftConfig
from svdtune.digests import PEFT_PREFIX
from svdtune.layer import SVDScaleShiftLayer
from svdtune.learned import in_present_format


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str = "default", **download_options: Any
) -> None:
    """Overwrites the values of a loaded adapter in place with those of a saved adapter.

    The swap does not decompose, move or allocate anything on the model's device. It does not trigger recompilation
    of a compiled model.

    Args:
        model: A `PeftModel` or a transformers model that has the adapter, compiled or not.
        model_name_or_path: Folder or hub name of the saved adapter.
        adapter_name: Name of the loaded adapter to overwrite.
        **download_options: Options for the hub, such as ``subfolder``, ``revision`` and ``token``.

    Raises:
        ValueError: if ``adapter_name`` is not loaded or is merged. Also if the saved adapter is damaged, belongs to
            another method, or has other layers, ranks or settings. The loaded adapter then stays unchanged.

    Warns:
        UserWarning: if the saved adapter was trained on another base model.
    """
    model = getattr(model, "_orig_mod", model)
    loaded: SVDScaleShiftConfig | None = getattr(model, "peft_config", {}).get(adapter_name)
    if loaded is None:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace; load one first.")
    if any(
        adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, SVDScaleShiftLayer)
    ):
        raise ValueError(f"The adapter {adapter_name!r} is merged; unmerge_adapter() before replacing it.")
    config = SVDScaleShiftConfig.from_pretrained(model_name_or_path, **download_options)
    if not isinstance(config, SVDScaleShiftConfig):
        raise ValueError(f"{model_name_or_path} is an adapter of another method, {type(config).__name__}.")
    for name in SEMANTIC_FIELDS:
        if getattr(config, name) != getattr(loaded, name):
            raise ValueError(
                f"{model_name_or_path} cannot replace {adapter_name!r}: its `{name}` is "
                f"{getattr(config, name)!r}, and not {getattr(loaded, name)!r}."
            )
    config.strict = loaded.strict
    check_fingerprints(model, adapter_name, config)
    state_dict = load_peft_weights(model_name_or_path, device="cpu", **download_options)
    _drop_equal_embeddings(model_name_or_path, state_dict, model)
    _check_same_shapes(
        model_name_or_path,
        in_present_format(state_dict),
        get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False),
    )
    loaded.unchecked_digests = config.unchecked_digests
    set_peft_model_state_dict(model, state_dict, adapter_name)  # clears `unchecked_digests`, even if it fails
    # If training continues, the values belong to the weights of this model, as after loading.
    loaded.fingerprints = config.fingerprints if loaded.inference_mode else None
    loaded.digests = config.digests if loaded.inference_mode else None


def _drop_equal_embeddings(source: str, state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Removes embeddings that equal the model's. PEFT saves them automatically if an embedding is tuned.

    Raises:
        ValueError: if an embedding differs from the model's.
    """
    modules, present = embedding_names(model), model.state_dict()
    for key in list(state_dict):
        name = key.removeprefix(PEFT_PREFIX)
        if is_inside(name, modules) and name.endswith("base_layer.weight"):
            present_value = present.get(key, present.get(name))
            if present_value is None or not is_same(state_dict[key], present_value):
                raise ValueError(f"{source} cannot replace the loaded adapter: it contains other embeddings, {name}.")
            del state_dict[key]


def _check_same_shapes(source: str, given: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    # A transformers model has no PeftModel around it, so its names lack the prefix.
    shapes, wanted = (
        {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in state.items()}
        for state in (given, loaded)
    )
    differing = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        found = f"is {shapes[key]}" if key in shapes else "is missing"
        expected = f"not {wanted[key]}" if key in wanted else "should not be there"
        raise ValueError(
            f"{source} cannot replace the loaded adapter: {len(differing)} values differ, {key} {found} and "
            f"{expected}."
        )
