"""What is minimised: focal and Dice loss, on logits, per image and label."""

from __future__ import annotations

from monai.losses import DiceLoss, FocalLoss
from torch import Tensor, nn


class FocalDiceLoss(nn.Module):
    """``focal_weight`` * focal + Dice, as SAM was trained, each averaged over images and labels.

    The Dice term is smoothed by one pixel, so that a blank mask rewards a blank prediction.

    Shape: logits and masks (B, K, S, S), masks of zeros and ones; returns a scalar.
    """

    def __init__(self, focal_weight: float) -> None:
        super().__init__()
        self.focal_weight = focal_weight
        self.focal = FocalLoss(gamma=2.0)
        self.dice = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)

    def forward(self, mask_logits: Tensor, masks: Tensor) -> Tensor:
        mask_logits = mask_logits.float()
        return self.focal_weight * self.focal(mask_logits, masks) + self.dice(mask_logits, masks)
