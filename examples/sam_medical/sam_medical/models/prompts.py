"""What SAM's mask decoder is asked for: label names, nothing, the image itself, or an expert's point or box.

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
        dense: What is added to the image embeddings, (B, P, 256, h, w); None for the prompt encoder's "no mask".
        given: (B, P), False where an expert had nothing to point at; None if there is always a prompt.
    """

    tokens: Tensor
    dense: Tensor | None = None
    given: Tensor | None = None


class Prompter(nn.Module):
    """Makes `Prompts` for a backbone from images (B, 3, S, S) and true masks (B, K, S, S).

    Attributes:
        needs_box: Whether a decoder that was trained with boxes also gets the box around the whole image, beside these
            prompts.
        learned_modules: Names of the modules that learn; an empty name is the prompter as a whole.
    """

    needs_box = True
    learned_modules: tuple[str, ...] = ()


class TextAffineLayer(nn.Module):
    """Text embeddings (K, D) to prompt tokens (K, 256): one learned layer, the paper's TAL.

    Normalised token by token (the published code does it over the batch), so that a token depends on its own label
    alone.
    """

    def __init__(self, text_width: int, prompt_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_width, prompt_width)
        self.norm = nn.LayerNorm(prompt_width)

    def forward(self, text_embeddings: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(text_embeddings)))


class TextPrompts(Prompter):
    """One token per label, from its name's text embedding (K, D)."""

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
    """One learned token per label, for names that a text encoder does not know or cannot tell apart."""

    learned_modules = ("tokens",)

    def __init__(self, labels: int, prompt_width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(labels, prompt_width)

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        numbers = torch.arange(self.tokens.num_embeddings, device=images.device)
        return Prompts(self.tokens(numbers)[None, :, None].expand(len(images), -1, -1, -1))


class NoPrompts(Prompter):
    """One prompt without tokens: SAMed's, where each of the decoder's masks stands for a label."""

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        return Prompts(images.new_zeros(len(images), 1, 0, backbone.prompt_width))


class ImagePrompts(Prompter):
    """AutoSAM's: a network computes from the image what SAM's prompt encoder computes from a mask, per label.

    MONAI's U-Net replaces AutoSAM's HarDNet, which no well-kept library has.
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
        size = [8 * -(-side // 8) for side in images.shape[-2:]]  # what three halvings divide
        features = self.unet(F.interpolate(images, size=size, mode="bilinear", align_corners=False))
        dense = self.project(F.adaptive_avg_pool2d(features, self.grid)).unflatten(1, (self.labels, -1))
        tokens = images.new_zeros(len(images), self.labels, 0, dense.shape[2])
        return Prompts(tokens, dense.to(images.dtype))


class PointPrompts(Prompter):
    """A point inside each label's true mask: any of its pixels in training, else the one farthest from its border.

    A label that is absent gets no prompt, so an expert also says which labels there are.
    """

    needs_box = False

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        assert true_masks is not None
        choose = random_point if self.training else innermost_point
        points = torch.stack([torch.stack([choose(mask) for mask in masks]) for masks in true_masks])
        return Prompts(backbone.embed_points(points.to(images)), given=true_masks.flatten(2).any(2))


class BoxPrompts(Prompter):
    """The box around each label's true mask; as for points, a label that is absent gets no prompt."""

    needs_box = False

    def forward(self, images: Tensor, true_masks: Tensor | None, backbone: Backbone) -> Prompts:
        assert true_masks is not None
        boxes = torch.stack([torch.stack([bounding_box(mask) for mask in masks]) for masks in true_masks])
        return Prompts(backbone.embed_boxes(boxes.to(images)), given=true_masks.flatten(2).any(2))


@dataclass(frozen=True)
class PromptKind:
    """A way to prompt, from which a method chooses.

    Attributes:
        name: As messages and tables say it.
        make: The prompter for a backbone, a number of labels and, if there are any, their text embeddings (K, D).
        from_labels: Whether the label names are the prompts.
        from_expert: Whether somebody must point at what is to be segmented, in every image.
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
    """(x, y) of any pixel of a mask (S, S), by torch's random numbers; (0, 0) if it is blank."""
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(2)
    chosen = int(torch.randint(len(rows), ()))
    return torch.tensor([float(columns[chosen]), float(rows[chosen])])


def innermost_point(mask: Tensor) -> Tensor:
    """(x, y) of the pixel of a mask (S, S) that is farthest from what is not mask; (0, 0) if it is blank."""
    inside = np.pad(mask.cpu().numpy() > 0, 1)
    row, column = np.unravel_index(ndimage.distance_transform_edt(inside).argmax(), inside.shape)
    return torch.tensor([max(column - 1.0, 0.0), max(row - 1.0, 0.0)])


def bounding_box(mask: Tensor) -> Tensor:
    """(left, top, right, bottom) of a mask (S, S), in pixels; zeros if it is blank."""
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float().cpu()
