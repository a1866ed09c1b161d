"""Saves and loads adapters: a folder with the trained tensors and the task, which is enough to use the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from sam_medical.adapters.building import build_untuned
from sam_medical.adapters.model_card import model_card
from sam_medical.adapters.task import ADVICE, TEXT_FILE, Task, read_task, write_task
from sam_medical.common.errors import UserError
from sam_medical.common.files import naming, whole_folder, write_tensors
from sam_medical.common.tensors import read_tensors
from sam_medical.common.values import shortened
from sam_medical.methods import METHODS
from svdtune.learned import in_present_format


def save_adapter(model: nn.Module, text_embeddings: Tensor | None, task: Task, folder: Path) -> None:
    """Writes an adapter into an existing folder.

    Args:
        model: The trained model.
        text_embeddings: The text embeddings of the labels, (K, D); None if the model is not prompted by text.
        task: The task of the adapter.
        folder: The folder to fill.

    Raises:
        OSError: if the disk is full or read-only.
    """
    with naming(folder):
        METHODS[task.method].tuner.save(model, folder)
        if text_embeddings is not None:
            write_tensors(folder / TEXT_FILE, {"text_embeddings": text_embeddings})
        (folder / "README.md").write_text(model_card(task), encoding="utf-8")
        write_task(task, folder)


def load_adapter(folder: Path, backbone: str | None = None) -> tuple[nn.Module, Task]:
    """Loads a trained model in evaluation mode, and its task.

    Args:
        folder: The folder of the adapter.
        backbone: The pretrained weights, if they have moved since training.

    Raises:
        UserError: if files are missing or damaged, or the base model is a different one.
    """
    folder = whole_folder(folder)
    task = read_task(folder)
    tuner = METHODS[task.method].tuner
    text_embeddings = read_text_embeddings(folder / TEXT_FILE, len(task.labels)) if task.uses_text else None
    state = in_present_format(read_tensors(folder / tuner.weights_file))
    model, target_modules, task = build_untuned(replace(task, backbone=backbone or task.backbone), text_embeddings)
    return tuner.restore(model, target_modules, folder, state).eval(), task


def read_text_embeddings(path: Path, labels: int) -> Tensor:
    """Reads the text embeddings of the labels, (K, D).

    Args:
        path: The safetensors file.
        labels: The number K of labels.

    Raises:
        UserError: if the file contains anything else.
    """
    tensors = read_tensors(path)
    if list(tensors) != ["text_embeddings"]:
        raise UserError(f"{path} holds {shortened(sorted(tensors))}, and not text_embeddings alone; {ADVICE}.")
    text = tensors["text_embeddings"]
    if text.ndim != 2 or len(text) != labels or not text.shape[1] or not text.is_floating_point():
        raise UserError(
            f"{path}: text_embeddings are {text.dtype} of shape {tuple(text.shape)}, and must be floats of shape "
            f"({labels}, D), one row per label; {ADVICE}."
        )
    return text.float()
