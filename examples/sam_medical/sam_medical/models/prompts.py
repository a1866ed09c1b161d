"""What SAM's mask decoder is asked for: label names, nothing, the image itself, or an expert's point or box.

Shape legend: B images, K labels, P prompts an image, n tokens a prompt, S image side, h w the encoder's grid, D width
of the text embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from scipy import ndimage
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamPromptEncoder

# Of labels by name: from the text encoder, or a token that is learned.
PROMPTS = ("text", "learned")


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


class Prompting(nn.Module):
    """Makes `Prompts` from images (B, 3, S, S), true masks (B, K, S, S) and the prompt encoder.

    Attributes:
        needs_masks: Whether the prompts are taken from the true masks, as an expert would give them.
        needs_box: Whether a decoder that was trained with boxes gets the box around the whole image as well, beside
            these prompts.
    """

    needs_masks = False
    needs_box = True


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


class TextPrompts(Prompting):
    """One token a label, from its name's text embedding (K, D)."""

    text_embeddings: Tensor

    def __init__(self, text_embeddings: Tensor, prompt_width: int) -> None:
        super().__init__()
        self.register_buffer("text_embeddings", text_embeddings, persistent=False)
        self.text_affine = TextAffineLayer(text_embeddings.shape[1], prompt_width)

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        tokens = self.text_affine(self.text_embeddings)
        return Prompts(tokens[:, None].expand(len(images), -1, -1, -1))


class LearnedPrompts(Prompting):
    """One token a label, learned as it is: for names that a text encoder does not know, or cannot tell apart."""

    def __init__(self, labels: int, prompt_width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(labels, prompt_width)

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        numbers = torch.arange(self.tokens.num_embeddings, device=images.device)
        return Prompts(self.tokens(numbers)[None, :, None].expand(len(images), -1, -1, -1))


class NoPrompts(Prompting):
    """One prompt without tokens: SAMed's, where each of the decoder's masks stands for a label."""

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        return Prompts(images.new_zeros(len(images), 1, 0, prompt_encoder.hidden_size))


class ImagePrompts(Prompting):
    """AutoSAM's: a network makes of the image what SAM's prompt encoder would make of a mask, for each label.

    A U-Net of MONAI's stands where AutoSAM has a HarDNet, which no well-kept library carries.
    """

    WIDTH = 64

    def __init__(self, labels: int, grid: tuple[int, int], prompt_width: int) -> None:
        super().__init__()
        self.labels = labels
        self.grid = grid
        self.unet = UNet(2, 3, self.WIDTH, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2)
        self.project = nn.Conv2d(self.WIDTH, labels * prompt_width, 1)

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        size = [8 * -(-side // 8) for side in images.shape[-2:]]  # what three halvings divide
        features = self.unet(F.interpolate(images, size=size, mode="bilinear", align_corners=False))
        dense = self.project(F.adaptive_avg_pool2d(features, self.grid)).unflatten(1, (self.labels, -1))
        tokens = images.new_zeros(len(images), self.labels, 0, dense.shape[2])
        return Prompts(tokens, dense.to(images.dtype))


class PointPrompts(Prompting):
    """A point inside each label's true mask: any of its pixels in training, else the one farthest from its border.

    Labels that are absent get no prompt, so an expert also says which labels there are.

    Args:
        in_box: Whether the prompt encoder gets the box around the whole image with each point.
    """

    needs_masks = True
    needs_box = False

    def __init__(self, in_box: bool) -> None:
        super().__init__()
        self.in_box = in_box

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        assert true_masks is not None
        choose = random_point if self.training else innermost_point
        points = torch.stack([torch.stack([choose(mask) for mask in masks]) for masks in true_masks])
        # From the middle of a pixel of ours to that of one of theirs, to which the prompt encoder adds a half.
        points = _scaled(points.to(images) + 0.5, images, prompt_encoder) - 0.5
        given = true_masks.flatten(2).any(2)
        side = prompt_encoder.input_image_size
        box = points.new_tensor([0, 0, side, side]).expand(*given.shape, 4) if self.in_box else None
        tokens, _ = prompt_encoder(points[:, :, None], torch.ones_like(given[..., None], dtype=torch.int), box, None)
        return Prompts(tokens, given=given)


class BoxPrompts(Prompting):
    """The box around each label's true mask; as for points, labels that are absent get no prompt."""

    needs_masks = True
    needs_box = False

    def forward(self, images: Tensor, true_masks: Tensor | None, prompt_encoder: SamPromptEncoder) -> Prompts:
        assert true_masks is not None
        boxes = torch.stack([torch.stack([bounding_box(mask) for mask in masks]) for masks in true_masks])
        boxes = _scaled(boxes.to(images), images, prompt_encoder)
        tokens, _ = prompt_encoder(None, None, boxes, None)
        return Prompts(tokens, given=true_masks.flatten(2).any(2))


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


def _scaled(coordinates: Tensor, images: Tensor, prompt_encoder: SamPromptEncoder) -> Tensor:
    """Pixels of the image in those of the size that the prompt encoder counts in."""
    return coordinates * (prompt_encoder.input_image_size / images.shape[-1])
