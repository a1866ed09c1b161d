"""An adapter's folder: what was learned, and what it was learned for, so that it can be used on its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

import svdtune  # noqa: F401 - makes the method known to PEFT, which reads its name in the adapter's folder
from ssam.backbones import Backbone, load_backbone
from ssam.errors import UserError
from ssam.files import write_json
from ssam.model import TextPromptedSam
from ssam.text import encode_labels

TASK_FILE = "task.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Task:
    """What an adapter is for.

    Attributes:
        dataset: The dataset it was trained on, by its name in `ssam.data.DATASETS`.
        labels: Names of the labels, in the order of the model's masks.
        backbone, image_size, text_encoder: What the model is built of; see `load_backbone` and `encode_labels`.
        backbone_digest: Of the pretrained weights; an adapter is worth nothing on others.
    """

    dataset: str
    labels: tuple[str, ...]
    backbone: str
    image_size: int
    text_encoder: str
    backbone_digest: str = ""


def build_model(task: Task) -> tuple[TextPromptedSam, Backbone, Tensor, Task]:
    """The untuned model, its backbone, the labels' text embeddings (K, D), and the task with its digest.

    Raises:
        UserError: if the backbone's weights are not those of the task's digest, where it has one.
    """
    text_embeddings = encode_labels(task.text_encoder, task.labels)
    backbone = load_backbone(task.backbone, task.image_size)
    digest = digest_of(backbone)
    if task.backbone_digest and digest != task.backbone_digest:
        raise UserError(
            f"the adapter belongs to another base model: it was trained on weights with digest "
            f"{task.backbone_digest}, and {task.backbone} has {digest}; give the right weights with --backbone."
        )
    model = TextPromptedSam(backbone, text_embeddings.shape[1])
    return model, backbone, text_embeddings, replace(task, backbone_digest=digest)


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


def save_adapter(model: PeftModel, task: Task, folder: Path) -> None:
    model.save_pretrained(str(folder))
    write_json(folder / TASK_FILE, asdict(task))


def load_adapter(folder: Path, backbone: str | None = None) -> tuple[PeftModel, Tensor, Task]:
    """A trained model in evaluation mode, its labels' text embeddings, and its task.

    Args:
        folder: Where `save_adapter` put it.
        backbone: Where the pretrained weights are, if no longer where the adapter was trained.

    Raises:
        UserError: if files are missing or damaged, or the base model is another one.
    """
    task = read_task(folder)
    model, _, text_embeddings, task = build_model(replace(task, backbone=backbone) if backbone else task)
    saved = _saved_names(folder)
    peft_model = PeftModel.from_pretrained(model, str(folder))
    differing = sorted(saved ^ set(get_peft_model_state_dict(peft_model)))
    if differing:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit its own configuration: {len(differing)} tensors are missing or "
            f"unknown, first of them {differing[0]}; train again, or fetch the whole folder again."
        )
    return peft_model.eval(), text_embeddings, task


def read_task(folder: Path) -> Task:
    for name in (TASK_FILE, "adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; give the folder that train.py wrote, RUN/adapter.")
    try:
        content = json.loads((folder / TASK_FILE).read_text())
        content["labels"] = tuple(content["labels"])
        return Task(**content)
    except (ValueError, TypeError, KeyError) as error:
        expected = ", ".join(field.name for field in fields(Task))
        raise UserError(f"{folder / TASK_FILE} must be JSON with the keys {expected}.") from error


def _saved_names(folder: Path) -> set[str]:
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again, or fetch the file again.") from error
