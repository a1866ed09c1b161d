"""An adapter's folder: what was learned, and what it was learned for, so that it can be used on its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sam_medical.adapters.task import (
    ADVICE,
    CONFIG_FILE,
    PLAIN_WEIGHTS_FILE,
    TEXT_FILE,
    Task,
    read_object,
    read_task,
    weights_file_of,
    write_task,
)
from sam_medical.common.errors import UserError, first_line
from sam_medical.common.files import naming, whole_folder, write_tensors
from sam_medical.common.values import shortened
from sam_medical.methods import METHODS
from sam_medical.methods.tuning import check_target_modules, expected_config, kept_tensors, load_kept_tensors, tune
from sam_medical.models.backbones import Backbone, load_backbone
from sam_medical.models.networks import build_network
from sam_medical.models.prompted_sam import PromptedSam
from sam_medical.models.prompts import (
    BoxPrompts,
    ImagePrompts,
    LearnedPrompts,
    NoPrompts,
    PointPrompts,
    Prompting,
    TextPrompts,
)
from svdtune.learned import in_present_format

# Of an adapter's configuration, what is not the same for every adapter of a method on a model.
FREE_CONFIG_KEYS = {
    "auto_mapping",
    "digests",
    "fingerprints",
    "format_version",
    "inference_mode",
    "peft_version",
}


def build_model(task: Task, text_embeddings: Tensor | None) -> tuple[nn.Module, Task]:
    """The model, tuned as the task's method has it but not yet trained, and the task with the backbone's digest.

    Args:
        task: What to build.
        text_embeddings: Of the labels, (K, D), for methods that are prompted with them.

    Raises:
        UserError: if a name in the task stands for nothing, or the backbone is not that of the task's digest.
    """
    model, target_modules, task = _build_untuned(task, text_embeddings)
    method = METHODS[task.method]
    if task.target_modules is not None and not method.takes_target_modules:
        raise UserError(f"target_modules has no meaning for {method.title}; leave it out.")
    return tune(model, method, len(task.labels), target_modules), task


def _build_untuned(task: Task, text_embeddings: Tensor | None) -> tuple[nn.Module, str, Task]:
    """The model as the method finds it, the expression of the layers to tune, and the task with the digest."""
    method = METHODS[task.method]
    if method.network:
        return build_network(method.network, len(task.labels), task.image_size), "", task
    backbone = load_backbone(task.backbone, task.image_size)
    digest = digest_of(backbone)
    if task.backbone_digest and digest != task.backbone_digest:
        raise UserError(
            f"the adapter belongs to another base model: it was trained on weights with digest "
            f"{task.backbone_digest}, and {task.backbone} has {digest}; give the right weights with --backbone."
        )
    model = PromptedSam(backbone, build_prompts(task, backbone, text_embeddings))
    return model, task.target_modules or backbone.target_modules, replace(task, backbone_digest=digest)


def build_prompts(task: Task, backbone: Backbone, text_embeddings: Tensor | None) -> Prompting:
    """What the task's method prompts SAM's decoder with."""
    method, labels = METHODS[task.method], len(task.labels)
    width = backbone.prompt_encoder.hidden_size
    if method.prompts == "text" and task.prompt == "learned":
        return LearnedPrompts(labels, width)
    if method.prompts == "text":
        assert text_embeddings is not None
        return TextPrompts(text_embeddings, width)
    if method.prompts == "image":
        return ImagePrompts(labels, backbone.prompt_encoder.image_embedding_size, width)
    if method.prompts == "point":
        return PointPrompts(in_box=backbone.whole_image_box)
    return {"none": NoPrompts, "box": BoxPrompts}[method.prompts]()


def digest_of(backbone: Backbone) -> str:
    """Sixteen hexadecimal digits that stand for the pretrained weights.

    Position tables are left out, because resizing them rounds differently from machine to machine.
    """
    digest = hashlib.sha256()
    for part in (backbone.image_encoder, backbone.prompt_encoder, backbone.mask_decoder):
        for name, tensor in part.state_dict().items():
            if "pos" not in name:
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: nn.Module, text_embeddings: Tensor | None, task: Task, folder: Path) -> None:
    """Fills a folder that is to be an adapter's.

    Raises:
        OSError: if the disk does not take it.
    """
    with naming(folder):
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder))
        else:
            write_tensors(folder / PLAIN_WEIGHTS_FILE, kept_tensors(model))
        if text_embeddings is not None:
            write_tensors(folder / TEXT_FILE, {"text_embeddings": text_embeddings})
        (folder / "README.md").write_text(model_card(task), encoding="utf-8")
        write_task(task, folder)


def model_card(task: Task) -> str:
    """What the folder holds, for a person who finds it."""
    method = METHODS[task.method]
    labels = ", ".join(task.labels)
    by = ", by the names alone" if task.uses_text else ""
    facts = [f"- Method: {method.source}" + (f"; {method.departs}" if method.departs else "")]
    if method.is_sam:
        facts.append(
            f"- Base model: `{task.backbone}` at {task.image_size} pixels, weights with digest "
            f"`{task.backbone_digest}`"
        )
    if method.needs_text and not task.uses_text:
        facts.append("- Prompts: a learned token a label, and no text encoder")
    facts.append(
        f"- Images are read with intensity `{task.intensity}` and offset `{task.offset}`, volumes in the plane "
        f"`{task.plane}`"
    )
    if task.uses_text:
        facts.append(f"- Text encoder: `{task.text_encoder}`; its embeddings of the labels are in `{TEXT_FILE}`")
    lines = [
        "---",
        *(["library_name: peft"] if method.adapter else []),
        "tags: [svdtune, segment-anything, medical-imaging]",
        "---",
        "",
        f"# {method.title}: {labels}",
        "",
        f"Segments {labels} in images like those of {task.dataset}{by}. For research only; not a medical device.",
        "",
        *facts,
        "",
    ]
    if method.adapter:
        lines += ["PEFT reads this folder once its method is known: `import svdtune`.", ""]
    if not method.needs_expert:
        lines += [
            "In svdtune's repository:",
            "",
            "    python examples/sam_medical/predict.py --adapter FOLDER --images IMAGES --output MASKS",
            "",
        ]
    return "\n".join(lines)


def load_adapter(folder: Path, backbone: str | None = None) -> tuple[nn.Module, Task]:
    """A trained model in evaluation mode, and its task.

    Args:
        folder: Where `save_adapter` put it.
        backbone: Where the pretrained weights are, if no longer where the adapter was trained.

    Raises:
        UserError: if files are missing or damaged, or the base model is another one.
    """
    folder = whole_folder(folder)
    task = read_task(folder)
    method = METHODS[task.method]
    text = read_text_embeddings(folder / TEXT_FILE, len(task.labels)) if task.uses_text else None
    weights_file = folder / weights_file_of(task)
    weights = in_present_format(read_tensors(weights_file))
    model, target_modules, task = _build_untuned(replace(task, backbone=backbone or task.backbone), text)
    if method.adapter and isinstance(model, PromptedSam):
        check_target_modules(model, target_modules)
        _check_config(folder / CONFIG_FILE, expected_config(model, method, target_modules))
        model = _with_peft_adapter(model, folder)
    else:
        model = tune(model, method, len(task.labels), target_modules)
    check_like(weights_file, weights, kept_tensors(model))
    if not method.adapter:
        load_kept_tensors(model, weights)
    return model.eval(), task


def _with_peft_adapter(model: PromptedSam, folder: Path) -> nn.Module:
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # of whatever kind PEFT and the method have for what is in a file
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} is damaged ({reason}); train again, or fetch the whole folder again.") from error


def _check_config(path: Path, expected: PeftConfig) -> None:
    """Raises a `UserError` where a configuration is not the one that the method has on this model.

    It is compared and not tried out, because an expression of a stranger can take longer to match than anybody waits.
    """
    config = read_object(path)
    wanted = expected.to_dict()
    for key in sorted({"peft_type", "target_modules"} - config.keys()):
        raise UserError(f"{path} lacks the key {key!r}; {ADVICE}.")
    for key in sorted(config.keys() & wanted.keys() - FREE_CONFIG_KEYS):
        if _plain(config[key]) != _plain(wanted[key]):
            raise UserError(
                f"{path}: {key} is {shortened(config[key])}, and for this task it is {shortened(wanted[key])}; fetch "
                "the whole folder again."
            )


def _plain(value: Any) -> str:
    """As JSON, with lists in one order, since some were sets."""
    if isinstance(value, (list, set, tuple)):
        value = sorted(map(_plain, value))
    return json.dumps(value, sort_keys=True, default=str)


def read_text_embeddings(path: Path, labels: int) -> Tensor:
    """The labels' text embeddings, (K, D).

    Raises:
        UserError: if the file holds anything else.
    """
    tensors = read_tensors(path)
    if list(tensors) != ["text_embeddings"]:
        raise UserError(f"{path} holds {shortened(sorted(tensors))}, and not text_embeddings alone; {ADVICE}.")
    text = tensors["text_embeddings"]
    if text.ndim != 2 or len(text) != labels or not text.shape[1] or not text.is_floating_point():
        raise UserError(
            f"{path}: text_embeddings are {text.dtype} of shape {tuple(text.shape)}, and must be floats of shape "
            f"({labels}, D), a row a label; {ADVICE}."
        )
    return text.float()


def check_like(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a `UserError` if a file's tensors are not a model's by name, shape and kind of number."""
    differing = sorted(tensors.keys() ^ expected.keys())
    if differing:
        raise UserError(
            f"{path} does not fit its own configuration: {len(differing)} tensors are missing or unknown, first of "
            f"them {differing[0]}; train again, or fetch the whole folder again."
        )
    for name, tensor in tensors.items():
        like = expected[name]
        is_alike = tensor.dtype == like.dtype or (tensor.is_floating_point() and like.is_floating_point())
        if not is_alike or tensor.shape != like.shape:
            raise UserError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and must be {like.dtype} of shape "
                f"{tuple(like.shape)}; train again, or fetch the whole folder again."
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        UserError: if it is damaged, or some of its numbers are none.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); train again, or fetch the file again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; train again, or fetch the file again.")
    return tensors
