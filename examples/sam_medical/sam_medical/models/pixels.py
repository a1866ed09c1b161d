"""From images between zero and one to the values that an encoder was trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class ImagenetNormalization(nn.Module):
    """Subtracts ImageNet's mean and divides by its standard deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None] / 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None] / 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class MinMaxScaling(nn.Module):
    """Each image stretched to the range from zero to one, as LiteMedSAM was trained."""

    def forward(self, images: Tensor) -> Tensor:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (images - low) / (high - low).clamp(min=1e-8)
