"""An adapter of SAM, from the official package's model to transformers' model of the same weights and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save

from svdtune.config import SVDScaleShiftConfig
from svdtune.digests import PEFT_PREFIX, digest_of_each
from svdtune.files import CHOICES, finish_adapter_files, mention_plugin, write_whole
from svdtune.model import SVDScaleShiftModel
from svdtune.sam_names import Naming, rename_module, rename_tensor

# What says of the other model that it is the one here, or says by its names which layers are tuned.
OF_THE_OTHER_MODEL = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "auto_mapping")),
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
}


def convert_sam_adapter(folder: str | Path, output_folder: str | Path, to: Naming) -> None:
    """Writes an adapter for the same SAM in another package: every name is changed, and no value.

    It may be of the whole model (``segment_anything``'s ``Sam``, transformers' `SamModel`) or of the image encoder
    alone. Its config names the tuned layers one by one afterwards, and no base model.

    Args:
        folder: The adapter's folder.
        output_folder: Where to write the other one; another folder.
        to: Whose names it gets, "transformers" or "segment_anything".

    Raises:
        ValueError: if the folder holds no whole adapter of this method, or one of something that SAM does not have in
            both packages; with its name. Then nothing is written.
    """
    folder, output_folder = Path(folder), Path(output_folder)
    if to not in get_args(Naming):
        raise ValueError(f"`to` is {to!r}; it can be 'transformers' or 'segment_anything'.")
    if folder.resolve() == output_folder.resolve():
        raise ValueError(f"{output_folder} is the adapter's own folder. Name another one.")
    config = _config_of_sam_adapter(folder)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    renamed = {_in_file(name, to): tensor for name, tensor in tensors.items()}
    content = _renamed_config(config, json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")), tensors, to)
    if config.digests:
        content["digests"] = {**digest_of_each(renamed), CHOICES: config.digest_of_choices()}

    output_folder.mkdir(parents=True, exist_ok=True)
    write_whole(output_folder / SAFETENSORS_WEIGHTS_NAME, save(renamed, metadata={"format": "pt"}))
    write_whole(output_folder / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True).encode())
    mention_plugin(output_folder)
    finish_adapter_files(output_folder)


def _config_of_sam_adapter(folder: Path) -> SVDScaleShiftConfig:
    """The config, where all that it has can be renamed and the weights are whole."""
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no adapter's folder: it has no {name}.")
    config = SVDScaleShiftConfig.from_pretrained(str(folder))
    if not isinstance(config, SVDScaleShiftConfig):
        raise ValueError(f"{folder} is an adapter of another method, {type(config).__name__}.")
    for name in ("target_parameters", "trainable_token_indices"):
        if getattr(config, name):
            raise ValueError(f"{folder} cannot be converted: it has `{name}`, {getattr(config, name)!r}.")
    return config


def _renamed_config(
    config: SVDScaleShiftConfig, content: dict[str, Any], tensors: Iterable[str], to: Naming
) -> dict[str, Any]:
    """The file's ``content`` in the other names, whatever version it is of; ``config`` gets its choices too."""
    tuned, whole = _tuned_modules(tensors), _modules_trained_whole(config, tensors)
    config.modules_to_save = [rename_module(name, to) for name in whole] or None
    return {
        **content,
        **OF_THE_OTHER_MODEL,
        "target_modules": [rename_module(name, to) for name in tuned],
        "modules_to_save": config.modules_to_save,
        "rank_pattern": {rename_module(name, to): rank for name, rank in _ranks(config, tuned).items()},
        "fingerprints": _renamed_keys(config.fingerprints, to),
    }


def _in_file(name: str, to: Naming) -> str:
    """A tensor's name in an adapter file: PEFT's prefix, its name in the model, and what a tuned layer adds to it."""
    in_model = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    layer, separator, value = in_model.partition(f".{SVDScaleShiftModel.prefix}")
    if separator:
        renamed = f"{rename_module(layer, to)}{separator}{value}"
    else:
        renamed = rename_tensor(in_model, to)
        if ".base_layer." in name:
            renamed = ".base_layer.".join(renamed.rsplit(".", 1))
    return f"{PEFT_PREFIX}{renamed}" if name.startswith(PEFT_PREFIX) else renamed


def _tuned_modules(tensors: Iterable[str]) -> list[str]:
    mark = f".{SVDScaleShiftModel.prefix}"
    return sorted({name.removeprefix(PEFT_PREFIX).partition(mark)[0] for name in tensors if mark in name})


def _modules_trained_whole(config: SVDScaleShiftConfig, tensors: Iterable[str]) -> list[str]:
    """The modules that `modules_to_save` stands for, by their whole names, as PEFT finds them: by the end."""
    endings, found = tuple(config.modules_to_save or ()), set()
    for name in tensors:
        parts = name.removeprefix(PEFT_PREFIX).split(".")
        paths = (".".join(parts[:length]) for length in range(1, len(parts)))
        found.update([path for path in paths if endings and path.endswith(endings)][:1])
    return sorted(found)


def _ranks(config: SVDScaleShiftConfig, tuned: Iterable[str]) -> dict[str, int | float]:
    """The ranks that `rank_pattern` gives, layer by layer."""
    keys = {name: get_pattern_key(list(config.rank_pattern), name) for name in tuned}
    return {name: config.rank_pattern[key] for name, key in keys.items() if key in config.rank_pattern}


def _renamed_keys(by_module: Mapping[str, Any] | None, to: Naming) -> dict[str, Any] | None:
    return None if by_module is None else {rename_module(name, to): value for name, value in by_module.items()}
