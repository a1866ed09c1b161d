"""Dice in the three ways that papers count it, from each image's pixel counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MaskCounts:
    """Pixels of one image's predicted mask, its true mask, and both."""

    image: str
    label: str
    intersection: int
    predicted: int
    true: int

    @property
    def dice(self) -> float:
        """Dice as the paper takes it from Rahman et al. (CVPR 2023): 1 where both masks are blank."""
        total = self.predicted + self.true
        return 2 * self.intersection / total if total else 1.0


@dataclass(frozen=True)
class LabelScores:
    """One label's scores over a split.

    Attributes:
        dice: Mean over all images; an image where both masks are blank counts as 1, a false alarm as 0.
        dice_present: Mean over the images that have the label; None if none has it.
        dice_pooled: Of all images' pixels together.
        images, images_present: How many images there are, and how many have the label.
    """

    dice: float
    dice_present: float | None
    dice_pooled: float
    images: int
    images_present: int


def count_masks(image: str, labels: Sequence[str], predicted: np.ndarray, true: np.ndarray) -> list[MaskCounts]:
    """One `MaskCounts` a label, from bool masks (K, H, W)."""
    return [
        MaskCounts(image, label, int((p & t).sum()), int(p.sum()), int(t.sum()))
        for label, p, t in zip(labels, predicted, true, strict=True)
    ]


def score_labels(counts: Iterable[MaskCounts], labels: Sequence[str]) -> dict[str, LabelScores]:
    counts = list(counts)
    return {label: _score([count for count in counts if count.label == label]) for label in labels}


def mean_dice(scores: dict[str, LabelScores]) -> float:
    """The paper's average: over labels, of Dice over all images."""
    return float(np.mean([score.dice for score in scores.values()]))


def _score(counts: Sequence[MaskCounts]) -> LabelScores:
    present = [count for count in counts if count.true]
    pixels = sum(count.predicted + count.true for count in counts)
    return LabelScores(
        dice=float(np.mean([count.dice for count in counts])),
        dice_present=float(np.mean([count.dice for count in present])) if present else None,
        dice_pooled=2 * sum(count.intersection for count in counts) / pixels if pixels else 1.0,
        images=len(counts),
        images_present=len(present),
    )
