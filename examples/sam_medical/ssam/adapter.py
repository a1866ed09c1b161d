"""An adapter's folder: what was learned, and what it was learned for, so that it can be used on its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import svdtune  # noqa: F401 - makes the method known to PEFT, which reads its name in the adapter's folder
from ssam.backbones import Backbone, load_backbone
from ssam.data.base import require_label_name
from ssam.errors import UserError, first_line
from ssam.files import write_json, write_tensors
from ssam.methods import METHODS, Method
from ssam.model import PromptedSam
from ssam.networks import build_network
from ssam.prompts import BoxPrompts, ImagePrompts, NoPrompts, PointPrompts, Prompting, TextPrompts
from ssam.tuning import kept_tensors, load_kept_tensors, tune

TASK_FILE = "task.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN_WEIGHTS_FILE = "trained.safetensors"
TEXT_FILE = "text_embeddings.safetensors"


@dataclass(frozen=True)
class Task:
    """What an adapter is for.

    Attributes:
        dataset: The dataset it was trained on, by its name in `ssam.data.DATASETS`.
        labels: Names of the labels, in the order of the model's masks.
        backbone, image_size, text_encoder: What the model is built of; see `load_backbone` and `encode_labels`.
        backbone_digest: Of the pretrained weights; an adapter is worth nothing on others.
        method: How it was tuned, by its name in `ssam.methods.METHODS`.
        target_modules: Expression of the layers that were tuned; None for the backbone's own.
    """

    dataset: str
    labels: tuple[str, ...]
    backbone: str
    image_size: int
    text_encoder: str
    backbone_digest: str = ""
    method: str = "s-sam"
    target_modules: str | None = None


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
    model = PromptedSam(backbone, build_prompts(method, backbone, len(task.labels), text_embeddings))
    return model, task.target_modules or backbone.target_modules, replace(task, backbone_digest=digest)


def build_prompts(method: Method, backbone: Backbone, labels: int, text_embeddings: Tensor | None) -> Prompting:
    """What the method prompts SAM's decoder with."""
    width = backbone.prompt_encoder.hidden_size
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
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    else:
        write_tensors(folder / PLAIN_WEIGHTS_FILE, kept_tensors(model))
    if text_embeddings is not None:
        write_tensors(folder / TEXT_FILE, {"text_embeddings": text_embeddings})
    write_json(folder / TASK_FILE, asdict(task))
    (folder / "README.md").write_text(model_card(task))


def model_card(task: Task) -> str:
    """What the folder holds, for a person who finds it."""
    method = METHODS[task.method]
    labels = ", ".join(task.labels)
    by = ", by the names alone" if method.needs_text else ""
    facts = [f"- Method: {method.source}" + (f"; {method.departs}" if method.departs else "")]
    if method.is_sam:
        facts.append(
            f"- Base model: `{task.backbone}` at {task.image_size} pixels, weights with digest "
            f"`{task.backbone_digest}`"
        )
    if method.needs_text:
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
    task = read_task(folder)
    method = METHODS[task.method]
    text = _read_tensors(folder / TEXT_FILE) if method.needs_text else {}
    weights_file = folder / weights_file_of(task)
    weights = _read_tensors(weights_file)
    model, target_modules, task = _build_untuned(
        replace(task, backbone=backbone or task.backbone), text.get("text_embeddings")
    )
    try:
        if method.adapter:
            model = PeftModel.from_pretrained(model, str(folder))
        else:
            model = tune(model, method, len(task.labels), target_modules)
            load_kept_tensors(model, weights)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder} is damaged ({first_line(error)}); train again, or fetch the whole folder again."
        ) from error
    differing = sorted(weights.keys() ^ kept_tensors(model).keys())
    if differing:
        raise UserError(
            f"{weights_file} does not fit its own configuration: {len(differing)} tensors are missing or "
            f"unknown, first of them {differing[0]}; train again, or fetch the whole folder again."
        )
    return model.eval(), task


def weights_file_of(task: Task) -> str:
    return PEFT_WEIGHTS_FILE if METHODS[task.method].adapter else PLAIN_WEIGHTS_FILE


def read_task(folder: Path) -> Task:
    path = folder / TASK_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {TASK_FILE}; give the folder that train.py wrote, RUN/adapter.")
    try:
        content = json.loads(path.read_text())
        content["labels"] = tuple(content["labels"])
        task = Task(**content)
    except (ValueError, TypeError, KeyError) as error:
        expected = ", ".join(field.name for field in fields(Task))
        raise UserError(f"{path} must be JSON with the keys {expected}.") from error
    if task.method not in METHODS:
        raise UserError(f"{path} has the unknown method {task.method!r}; the methods are {', '.join(METHODS)}.")
    for label in task.labels:
        require_label_name(label, path)
    needed = [weights_file_of(task)]
    needed += ["adapter_config.json"] if METHODS[task.method].adapter else []
    needed += [TEXT_FILE] if METHODS[task.method].needs_text else []
    for name in needed:
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; give the folder that train.py wrote, RUN/adapter.")
    return task


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again, or fetch the file again.") from error
