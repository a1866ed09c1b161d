"""Prompts of SAM's mask decoder: label names, none, the image itself, or an expert's points or boxes.

Shape legend: B images, K labels, P prompts per image, n tokens per prompt, S image side, h w the encoder's grid,
D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from scipy import ndimage
from torch import Tensor, nn

if TYPE_CHECKING:
    from sam_medical.models.backbone import Backbone


class Prompts(NamedTuple):
    """Prompts for a batch of images.

    Attributes:
        tokens: (B, P, n, 256).
        dense: Added to the image embeddings, (B, P, 256, h, w); None for the prompt encoder's "no mask" embedding.
            given: (B, P), False for prompts of absent labels, which an expert cannot give; None if all are given.
    """

    tokens: Tensor
    dense: Tensor | None = None
    given: Tensor | None = None


class Prompter(nn.Module):
    """Makes `Prompts` for a backbone from images (B, 3, S, S) and true masks (B, K, S, S).

    Attributes:
        needs_box: Whether a decoder that was trained with boxes also gets a box around the whole image.
            learned_modules: Names of the trained modules; an empty name is the whole prompter.
    """

    needs_box = True
    learned_modules: tuple[str, ...] = ()


class TextAffineLayer(nn.Module):
    """The paper's text affine layer (TAL): from text embeddings (K, D) to prompt tokens (K, 256).

    It uses layer norm, so each token depends on its own label only. The published code uses batch norm.
    """

    def __init__(self, text_width: int, prompt_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_width, prompt_width)
        self.norm = nn.LayerNorm(prompt_width)

    def forward(self, text_embeddings: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(text_embeddings)))


class TextPrompts(Prompter):
    """One token per label, computed from the text embeddings (K, D) of the label names."""

    learned_modules = ("text_affine",)
    text_embeddings: Tensor

    def __init__(self, text_embeddings: Tensor, prompt_width: int) -> None:
        super().__init__()
        self.register_buffer("text_embeddings", text_embeddings, persistent=False)
        self.text_affine = TextAffineLayer(text_embeddings.shape[1], prompt_width)

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        tokens = self.text_affine(self.text_embeddings)
        return Prompts(tokens[:, None].expand(len(images), -1, -1, -1))


class LearnedPrompts(Prompter):
    """One learned token per label, for names that a text encoder does not know or cannot distinguish."""

    learned_modules = ("tokens",)

    def __init__(self, labels: int, prompt_width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(labels, prompt_width)

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        numbers = torch.arange(self.tokens.num_embeddings, device=images.device)
        return Prompts(self.tokens(numbers)[None, :, None].expand(len(images), -1, -1, -1))


class NoPrompts(Prompter):
    """One prompt without tokens, as in SAMed: the decoder returns one mask per label."""

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        return Prompts(images.new_zeros(len(images), 1, 0, backbone.prompt_width))


class ImagePrompts(Prompter):
    """AutoSAM's prompts: a network computes dense prompts from the image, in place of SAM's mask prompts, per label.

    MONAI's U-Net replaces AutoSAM's HarDNet, which no maintained library provides.
    """

    WIDTH = 64
    learned_modules = ("",)

    def __init__(self, labels: int, grid: tuple[int, int], prompt_width: int) -> None:
        super().__init__()
        self.labels = labels
        self.grid = grid
        self.unet = UNet(2, 3, self.WIDTH, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2)
        self.project = nn.Conv2d(self.WIDTH, labels * prompt_width, 1)

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        size = [8 * -(-side // 8) for side in images.shape[-2:]]  # the U-Net halves the resolution three times
        features = self.unet(F.interpolate(images, size=size, mode="bilinear", align_corners=False))
        dense = self.project(F.adaptive_avg_pool2d(features, self.grid)).unflatten(1, (self.labels, -1))
        tokens = images.new_zeros(len(images), self.labels, 0, dense.shape[2])
        return Prompts(tokens, dense.to(images.dtype))


class PointPrompts(Prompter):
    """A point inside each label's true mask: a random pixel in training, otherwise the one farthest from the border.

    Absent labels get no prompt, so the expert also tells which labels are present.
    """

    needs_box = False

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        assert true_masks is not None
        choose = random_point if self.training else innermost_point
        points = torch.stack([torch.stack([choose(mask) for mask in masks]) for masks in true_masks])
        return Prompts(backbone.embed_points(points.to(images)), given=true_masks.flatten(2).any(2))


class BoxPrompts(Prompter):
    """The bounding box of each label's true mask. Absent labels get no prompt, as for points."""

    needs_box = False

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        assert true_masks is not None
        boxes = torch.stack([torch.stack([bounding_box(mask) for mask in masks]) for masks in true_masks])
        return Prompts(backbone.embed_boxes(boxes.to(images)), given=true_masks.flatten(2).any(2))


@dataclass(frozen=True)
class PromptKind:
    """A kind of prompt, which a method chooses.

    Attributes:
        name: The name in messages and tables.
        make: Creates the prompter from a backbone, the number of labels, and their text embeddings (K, D) or None.
        from_labels: Whether the label names are the prompts.
        from_expert: Whether an expert must prompt every image.
    """

    name: str
    make: Callable[[Backbone, int, Tensor | None], Prompter]
    from_labels: bool = False
    from_expert: bool = False


def _by_label(backbone: Backbone, labels: int, text_embeddings: Tensor | None) -> Prompter:
    if text_embeddings is None:
        return LearnedPrompts(labels, backbone.prompt_width)
    return TextPrompts(text_embeddings, backbone.prompt_width)


LABELS = PromptKind("text", _by_label, from_labels=True)
NOTHING = PromptKind("none", lambda backbone, labels, text: NoPrompts())
IMAGE = PromptKind("image", lambda backbone, labels, text: ImagePrompts(labels, backbone.grid, backbone.prompt_width))
POINT = PromptKind("point", lambda backbone, labels, text: PointPrompts(), from_expert=True)
BOX = PromptKind("box", lambda backbone, labels, text: BoxPrompts(), from_expert=True)


def random_point(mask: Tensor) -> Tensor:
    """Returns (x, y) of a random pixel of a mask (S, S), by torch's generator; (0, 0) if the mask is empty."""
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(2)
    chosen = int(torch.randint(len(rows), ()))
    return torch.tensor([float(columns[chosen]), float(rows[chosen])])


def innermost_point(mask: Tensor) -> Tensor:
    """Returns (x, y) of the pixel of a mask (S, S) that is farthest from its border; (0, 0) if it is empty."""
    inside = np.pad(mask.cpu().numpy() > 0, 1)
    row, column = np.unravel_index(ndimage.distance_transform_edt(inside).argmax(), inside.shape)
    return torch.tensor([max(column - 1.0, 0.0), max(row - 1.0, 0.0)])


def bounding_box(mask: Tensor) -> Tensor:
    """Returns (left, top, right, bottom) of a mask (S, S), in pixels; zeros if the mask is empty."""
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float().cpu()
