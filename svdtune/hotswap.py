"""Another adapter in the place of one that is loaded, without touching the model around it."""

from __future__ import annotations

from typing import Any

from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from svdtune.adapter_state import check_fingerprints, embedding_modules, is_below, is_same
from svdtune.config import GIVE_MEANING, SVDScaleShiftConfig
from svdtune.digests import PEFT_PREFIX
from svdtune.layer import SVDScaleShiftLayer
from svdtune.learned import in_present_format


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str = "default", **download_options: Any
) -> None:
    """Overwrites the values of a loaded adapter, in place, with those of a saved one.

    Nothing is decomposed, moved or allocated on the model's device, and a compiled model is not compiled again.

    Args:
        model: A model with the adapter, compiled or not: a `PeftModel`, or a model of transformers.
        model_name_or_path: Folder or hub name of the adapter to put in its place.
        adapter_name: The loaded adapter.
        download_options: ``subfolder``, ``revision``, ``token`` and the like, for the hub.

    Raises:
        ValueError: if there is no such adapter, if it is merged, or if the saved one tunes other layers or ranks, or
            in another way. The loaded adapter is then as it was.
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
    for name in GIVE_MEANING:
        if getattr(config, name) != getattr(loaded, name):
            raise ValueError(
                f"{model_name_or_path} cannot take the place of {adapter_name!r}: its `{name}` is "
                f"{getattr(config, name)!r}, and not {getattr(loaded, name)!r}."
            )
    config.strict = loaded.strict
    check_fingerprints(model, adapter_name, config)
    state_dict = load_peft_weights(model_name_or_path, device="cpu", **download_options)
    _drop_known_embeddings(model_name_or_path, state_dict, model)
    _check_same_shapes(
        model_name_or_path,
        in_present_format(state_dict),
        get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False),
    )
    loaded.unchecked_digests = config.unchecked_digests
    set_peft_model_state_dict(model, state_dict, adapter_name)  # which clears them, whatever comes of it
    # What is trained further here is made for the weights here, as after loading it.
    loaded.fingerprints = config.fingerprints if loaded.inference_mode else None
    loaded.digests = config.digests if loaded.inference_mode else None


def _drop_known_embeddings(source: str, state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Takes out the embeddings that PEFT saves by itself where some are tuned; those of the model are these already.

    Raises:
        ValueError: if they are others.
    """
    modules, present = embedding_modules(model), model.state_dict()
    for key in list(state_dict):
        name = key.removeprefix(PEFT_PREFIX)
        if is_below(name, modules) and name.endswith("base_layer.weight"):
            known = present.get(key, present.get(name))
            if known is None or not is_same(state_dict[key], known):
                raise ValueError(
                    f"{source} cannot take the loaded adapter's place: it brings other embeddings, {name}."
                )
            del state_dict[key]


def _check_same_shapes(source: str, given: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    # A model that transformers made has no wrapper around it, so its names lack the wrapper's.
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
            f"{source} cannot take the loaded adapter's place: {len(differing)} values differ, {key} {found} and "
            f"{expected}."
        )
