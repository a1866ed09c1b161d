"""Models that stand in for trained ones."""

import torch
from torch import nn


class BrightPixels(nn.Module):
    """Draws one label where the image is brighter than half, and another where it is darker."""

    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(20.0))

    def forward(self, images, true_masks=None):
        bright = self.sharpness * (images.mean(1, keepdim=True) - 0.5)
        return torch.cat([bright, -bright], 1)
