"""An adapter's folder: what was learned, and what it was learned for, so that it can be used on its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdtune  # noqa: F401 - makes the method known to PEFT, which reads its name in the adapter's folder
from ssam.backbones import Backbone, load_backbone
from ssam.errors import UserError, first_line
from ssam.files import write_json
from ssam.model import TextPromptedSam

TASK_FILE = "task.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEXT_FILE = "text_embeddings.safetensors"
MODEL_CARD = """---
library_name: peft
tags: [svdtune, segment-anything, medical-imaging]
---

# S-SAM adapter: {labels}

Segments {labels} in images like those of {dataset}, by the names alone. For research; not a medical device.

- Base model: `{backbone}` at {image_size} pixels, weights with digest `{backbone_digest}`
- Text encoder: `{text_encoder}`; its embeddings of the labels are in `text_embeddings.safetensors`

The method lives in the package svdtune, which has to be imported before PEFT loads this
folder: `import svdtune`. In svdtune's repository:

    python examples/sam_medical/predict.py --adapter FOLDER --images IMAGES --output MASKS
"""


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


def build_model(task: Task, text_width: int) -> tuple[TextPromptedSam, Backbone, Task]:
    """The untuned model, its backbone, and the task with the backbone's digest.

    Raises:
        UserError: if the backbone's weights are not those of the task's digest, where it has one.
    """
    backbone = load_backbone(task.backbone, task.image_size)
    digest = digest_of(backbone)
    if task.backbone_digest and digest != task.backbone_digest:
        raise UserError(
            f"the adapter belongs to another base model: it was trained on weights with digest "
            f"{task.backbone_digest}, and {task.backbone} has {digest}; give the right weights with --backbone."
        )
    return TextPromptedSam(backbone, text_width), backbone, replace(task, backbone_digest=digest)


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


def save_adapter(model: PeftModel, text_embeddings: Tensor, task: Task, folder: Path) -> None:
    model.save_pretrained(str(folder))
    save_file({"text_embeddings": text_embeddings.cpu().contiguous()}, folder / TEXT_FILE)
    write_json(folder / TASK_FILE, asdict(task))
    (folder / "README.md").write_text(MODEL_CARD.format(**{**asdict(task), "labels": ", ".join(task.labels)}))


def load_adapter(folder: Path, backbone: str | None = None) -> tuple[PeftModel, Tensor, Task]:
    """A trained model in evaluation mode, its labels' text embeddings (K, D), and its task.

    Args:
        folder: Where `save_adapter` put it.
        backbone: Where the pretrained weights are, if no longer where the adapter was trained.

    Raises:
        UserError: if files are missing or damaged, or the base model is another one.
    """
    task = read_task(folder)
    weights, text = _read_tensors(folder / WEIGHTS_FILE), _read_tensors(folder / TEXT_FILE)
    text_embeddings = text["text_embeddings"]
    model, _, task = build_model(replace(task, backbone=backbone or task.backbone), text_embeddings.shape[1])
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder} is damaged ({first_line(error)}); train again, or fetch the whole folder again."
        ) from error
    differing = sorted(weights.keys() ^ get_peft_model_state_dict(peft_model).keys())
    if differing:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit its own configuration: {len(differing)} tensors are missing or "
            f"unknown, first of them {differing[0]}; train again, or fetch the whole folder again."
        )
    return peft_model.eval(), text_embeddings, task


def read_task(folder: Path) -> Task:
    for name in (TASK_FILE, "adapter_config.json", WEIGHTS_FILE, TEXT_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; give the folder that train.py wrote, RUN/adapter.")
    try:
        content = json.loads((folder / TASK_FILE).read_text())
        content["labels"] = tuple(content["labels"])
        return Task(**content)
    except (ValueError, TypeError, KeyError) as error:
        expected = ", ".join(field.name for field in fields(Task))
        raise UserError(f"{folder / TASK_FILE} must be JSON with the keys {expected}.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again, or fetch the file again.") from error
