"""Losses on mask logits, per image and label."""

from __future__ import annotations

import torch
from monai.losses import DiceLoss, FocalLoss, SoftDiceclDiceLoss
from torch import Tensor, nn

from sam_medical.common.errors import UserError


class FocalDiceLoss(nn.Module):
    """``focal_weight`` * focal + Dice, as in SAM's training, each averaged over images and labels.

    The Dice term of an empty mask is 0, and only the focal term trains it. Otherwise it would stay near 1 until every
    pixel's probability vanishes, and dominate the loss of the other masks.

    Shape: logits and masks are (B, K, S, S), masks of zeros and ones; the result is a scalar.
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
    """The mean of Dice and clDice (arXiv:2003.07311), which compares the centre lines of masks.

    Shapes as in `FocalDiceLoss`. MONAI's clDice sums over labels before it divides, so each mask is passed separately.
    """

    ERODED_PIXELS = 10  # half of the thickness that can be thinned to a line

    def __init__(self) -> None:
        super().__init__()
        self.loss = SoftDiceclDiceLoss(iter_=self.ERODED_PIXELS, sigmoid=True)

    def forward(self, mask_logits: Tensor, masks: Tensor) -> Tensor:
        logits, masks = (tensor.flatten(0, 1)[:, None] for tensor in (mask_logits.float(), masks))
        parts = [self.loss(logit[None], mask[None]) for logit, mask in zip(logits, masks, strict=True)]
        return torch.stack(parts).mean()


def build_loss(name: str, focal_weight: float) -> nn.Module:
    """Returns the loss named by a `Method`: "focal-dice" or "dice-cldice"."""
    losses = {"focal-dice": lambda: FocalDiceLoss(focal_weight), "dice-cldice": DiceCenterlineLoss}
    if name not in losses:
        raise UserError(f"there is no loss {name!r}; a method's loss is one of {', '.join(losses)}.")
    return losses[name]()
