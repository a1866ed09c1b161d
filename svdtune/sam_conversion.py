"""Converts adapters of SAM between the official package's model and transformers' model of the same weights."""

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
from svdtune.files import CHOICES, complete_model_card, finish_adapter_files, write_whole
from svdtune.model import SVDScaleShiftModel
from svdtune.sam_names import Naming, rename_module, rename_tensor

# Config fields that identify the source model, or that select layers by its names.
RESET_FIELDS = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "auto_mapping")),
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
}


def convert_sam_adapter(folder: str | Path, output_folder: str | Path, to: Naming) -> None:
    """Converts an adapter for the same SAM weights in another package. It changes all names and no values.

    The adapter may belong to the whole model (``Sam`` of ``segment_anything``, `SamModel` of transformers) or to the
    image encoder alone. The new config lists each tuned layer by name, and has no base model.

    Args:
        folder: Folder of the adapter.
        output_folder: Folder for the converted adapter. It must differ from ``folder``.
        to: The target package, "transformers" or "segment_anything".

    Raises:
        ValueError: if ``folder`` has no complete adapter of this method. Also if the adapter tunes a module that only
            one of the packages has; the message names it. Nothing is written then.
    """
    folder, output_folder = Path(folder), Path(output_folder)
    if to not in get_args(Naming):
        raise ValueError(f"`to` is {to!r}; it can be 'transformers' or 'segment_anything'.")
    if folder.resolve() == output_folder.resolve():
        raise ValueError(f"{output_folder} is the adapter's own folder. Give another one.")
    config = _read_config(folder)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    renamed = {_rename_file_key(name, to): tensor for name, tensor in tensors.items()}
    content = _renamed_config(config, json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")), tensors, to)
    if config.digests:
        content["digests"] = {**digest_of_each(renamed), CHOICES: config.digest_of_choices()}

    output_folder.mkdir(parents=True, exist_ok=True)
    write_whole(output_folder / SAFETENSORS_WEIGHTS_NAME, save(renamed, metadata={"format": "pt"}))
    write_whole(output_folder / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True).encode())
    complete_model_card(output_folder)
    finish_adapter_files(output_folder)


def _read_config(folder: Path) -> SVDScaleShiftConfig:
    """Reads the config, and checks that the weights are complete and that everything can be renamed."""
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an adapter folder: it has no {name}.")
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
    """Renames the modules in a config file's ``content``, of any format version. Updates ``config``, too."""
    tuned, whole = _tuned_modules(tensors), _fully_trained_modules(config, tensors)
    config.modules_to_save = [rename_module(name, to) for name in whole] or None
    return {
        **content,
        **RESET_FIELDS,
        "target_modules": [rename_module(name, to) for name in tuned],
        "modules_to_save": config.modules_to_save,
        "rank_pattern": {rename_module(name, to): rank for name, rank in _ranks(config, tuned).items()},
        "fingerprints": _renamed_keys(config.fingerprints, to),
    }


def _rename_file_key(name: str, to: Naming) -> str:
    """Renames a tensor of an adapter file, keeping PEFT's prefix and the parts that a tuned layer adds."""
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


def _fully_trained_modules(config: SVDScaleShiftConfig, tensors: Iterable[str]) -> list[str]:
    """The full names of the modules in `modules_to_save`, which PEFT matches by their ends."""
    endings, found = tuple(config.modules_to_save or ()), set()
    for name in tensors:
        parts = name.removeprefix(PEFT_PREFIX).split(".")
        paths = (".".join(parts[:length]) for length in range(1, len(parts)))
        found.update([path for path in paths if endings and path.endswith(endings)][:1])
    return sorted(found)


def _ranks(config: SVDScaleShiftConfig, tuned: Iterable[str]) -> dict[str, int | float]:
    """The ranks from `rank_pattern`, by layer name."""
    keys = {name: get_pattern_key(list(config.rank_pattern), name) for name in tuned}
    return {name: config.rank_pattern[key] for name, key in keys.items() if key in config.rank_pattern}


def _renamed_keys(by_module: Mapping[str, Any] | None, to: Naming) -> dict[str, Any] | None:
    return None if by_module is None else {rename_module(name, to): value for name, value in by_module.items()}
