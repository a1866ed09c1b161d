"""The losses, on logits, per image and label."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss, FocalLoss, SoftDiceclDiceLoss
from torch import Tensor, nn


class FocalDiceLoss(nn.Module):
    """``focal_weight`` * focal + Dice, as SAM was trained, each averaged over images and labels.

    On a blank mask Dice counts 0: it would be near 1 until the last pixel's probability is gone, and drown the masks
    that are there. The focal term alone says that there is nothing.

    Shape: logits and masks (B, K, S, S), masks of zeros and ones; returns a scalar.
    """

    def __init__(self, focal_weight: float) -> None:
        super().__init__()
        self.focal_weight = focal_weight
        self.focal = FocalLoss(gamma=2.0)
        self.dice = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")

    def forward(self, mask_logits: Tensor, masks: Tensor) -> Tensor:
        mask_logits = mask_logits.float()
        is_there = masks.flatten(2).any(2)
        dice = self.dice(mask_logits, masks).flatten(1) * is_there
        return self.focal_weight * self.focal(mask_logits, masks) + dice.mean()


class DiceCenterlineLoss(nn.Module):
    """Half Dice, half clDice (arXiv:2003.07311): the overlap of masks, and of their centre lines.

    Shapes as above. MONAI's clDice sums over labels before it divides, so each mask goes in as an image of its own.
    """

    ERODED_PIXELS = 10  # half the thickness that is thinned to a line

    def __init__(self) -> None:
        super().__init__()
        self.loss = SoftDiceclDiceLoss(iter_=self.ERODED_PIXELS, sigmoid=True)

    def forward(self, mask_logits: Tensor, masks: Tensor) -> Tensor:
        logits, masks = (tensor.flatten(0, 1)[:, None] for tensor in (mask_logits.float(), masks))
        parts = [self.loss(logit[None], mask[None]) for logit, mask in zip(logits, masks, strict=True)]
        return torch.stack(parts).mean()


def build_loss(name: str, focal_weight: float) -> nn.Module:
    """The loss of a `Method`: "focal-dice" or "dice-cldice"."""
    return {"focal-dice": lambda: FocalDiceLoss(focal_weight), "dice-cldice": DiceCenterlineLoss}[name]()
