"""Builds the model of a task: the pretrained backbone, its prompts, and the method's trained parameters."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.methods import METHODS
from sam_medical.methods.method import Network
from sam_medical.models.loading import load_backbone
from sam_medical.models.networks import SegmentationNetwork, rounded_up


def build_model(task: Task, text_embeddings: Tensor | None) -> tuple[nn.Module, Task]:
    """Builds the model of a task with the method applied, before training.

    Args:
        task: The task.
        text_embeddings: The text embeddings of the labels, (K, D), for methods with text prompts.

    Returns:
        The model, and the task with the backbone's digest.

    Raises:
        UserError: if a name in the task is unknown, or the backbone does not match the task's digest.
    """
    method = METHODS[task.method]
    if task.target_modules is not None and not method.takes_target_modules:
        raise UserError(f"target_modules has no meaning for {method.title}; leave it out.")
    model, target_modules, task = build_untuned(task, text_embeddings)
    return method.tuner.apply(model, target_modules), task


def build_untuned(task: Task, text_embeddings: Tensor | None) -> tuple[nn.Module, str, Task]:
    """Builds the model without the method. Also returns the expression of the layers to tune, and the task."""
    method, labels = METHODS[task.method], len(task.labels)
    if isinstance(method.model, Network):
        network = method.model.make(labels, rounded_up(task.image_size))
        return SegmentationNetwork(network), "", task
    backbone = load_backbone(task.backbone, task.image_size)
    digest = backbone.digest()
    if task.backbone_digest and digest != task.backbone_digest:
        raise UserError(
            f"the adapter belongs to another base model: it was trained on weights with digest "
            f"{task.backbone_digest}, and {task.backbone} has {digest}; give the right weights with --backbone."
        )
    prompter = method.model.prompt.make(backbone, labels, text_embeddings if task.uses_text else None)
    try:
        backbone.prompt_with(prompter, labels if method.model.mask_per_label else None)
    except NotImplementedError as error:
        raise UserError(f"{method.title} needs a mask per label, which {task.backbone} cannot give.") from error
    return backbone, task.target_modules or backbone.target_modules, replace(task, backbone_digest=digest)
