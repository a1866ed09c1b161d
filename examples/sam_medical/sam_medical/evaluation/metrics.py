"""Segmentation metrics: Dice, IoU, surface distances and false alarms."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from sam_medical.common.errors import UserError
from sam_medical.common.files import replacing_file
from sam_medical.data.base import Sample

SCORES_FILE = "scores.csv"
# Tolerance of the surface Dice, as a share of the image's diagonal.
TOLERANCE = 0.01


@dataclass(frozen=True)
class MaskScore:
    """The scores of one label in one image.

    Attributes:
        image: The name of the image.
        label: The name of the label.
        intersection: Number of pixels in both masks.
        predicted: Number of pixels in the predicted mask.
        true: Number of pixels in the true mask.
        hausdorff95: 95th percentile of the surface distances, in pixels. The image's diagonal if nothing is predicted.
            None if the label is absent or distances were not requested.
        surface_dice: Share of both surfaces within `TOLERANCE` of the other; None as above.
        group: The patient, volume or video of the image; empty if there is none.
    """

    image: str
    label: str
    intersection: int
    predicted: int
    true: int
    hausdorff95: float | None = None
    surface_dice: float | None = None
    group: str = ""

    @property
    def dice(self) -> float:
        """Dice as in the paper, after Rahman et al. (CVPR 2023): 1 if both masks are empty."""
        total = self.predicted + self.true
        return 2 * self.intersection / total if total else 1.0

    @property
    def iou(self) -> float:
        union = self.predicted + self.true - self.intersection
        return self.intersection / union if union else 1.0


@dataclass(frozen=True)
class LabelScores:
    """The scores of one label over a split; None if a score is undefined.

    Attributes:
        dice: Mean over all images. An image where both masks are empty counts as 1, a false alarm as 0.
        dice_present: Mean over the images that have the label.
        dice_pooled: Dice of the pixels of all images together; None if no image has the label.
        iou: Intersection over union, mean over the images that have the label.
        hausdorff95: Mean over the images that have the label, in pixels.
        surface_dice: Mean over the images that have the label.
        false_alarms: Share of the images without the label in which some of it is predicted.
        images: Number of images.
            images_present: Number of images that have the label.
            trained: Whether a training image had the label. Labels without one are excluded from means.
    """

    dice: float
    dice_present: float | None
    dice_pooled: float | None
    iou: float | None
    hausdorff95: float | None
    surface_dice: float | None
    false_alarms: float | None
    images: int
    images_present: int
    trained: bool = True


def score_masks(
    sample: Sample, labels: Sequence[str], predicted: np.ndarray, distances: bool = False
) -> list[MaskScore]:
    """Scores the masks of one image, and returns one `MaskScore` per label.

    Args:
        sample: The image, with its true masks.
        labels: Names of the K labels.
        predicted: Bool masks (K, H, W).
        distances: Whether to compute surface distances, which is much slower than the rest.
    """
    scores = []
    for label, p, t in zip(labels, predicted, sample.masks, strict=True):
        counts = int((p & t).sum()), int(p.sum()), int(t.sum())
        scores.append(MaskScore(sample.name, label, *counts, *_distances(p, t, distances), sample.group))
    return scores


def score_labels(
    scores: Iterable[MaskScore], labels: Sequence[str], absent: Sequence[str] = ()
) -> dict[str, LabelScores]:
    """Aggregates scores per label.

    Args:
        scores: The scores of all images and labels.
        labels: The labels to return.
        absent: Labels that no training image had.
    """
    scores = list(scores)
    label_scores = {label: _score([score for score in scores if score.label == label]) for label in labels}
    return {label: replace(score, trained=label not in absent) for label, score in label_scores.items()}


def mean_dice(scores: dict[str, LabelScores]) -> float:
    """Returns the paper's mean Dice: over all images, then over labels."""
    return float(np.mean([score.dice for score in scores.values() if score.trained]))


def mean_pooled_dice(scores: dict[str, LabelScores]) -> float:
    """Returns the mean pooled Dice over the labels that occur; `mean_dice` if none does."""
    pooled = mean_scores(scores).dice_pooled
    return mean_dice(scores) if pooled is None else pooled


# Scores on the validation images by which the best adapter can be chosen.
CRITERIA: dict[str, Callable[[dict[str, LabelScores]], float]] = {
    "pooled-dice": mean_pooled_dice,
    "dice": mean_dice,
}


def mean_scores(scores: Mapping[str, LabelScores]) -> LabelScores:
    """Averages each score over the labels where it is defined. Numbers of images are summed over labels."""
    values = [score for score in scores.values() if score.trained]
    names = [field.name for field in fields(LabelScores) if field.name != "trained"]
    means: dict[str, Any] = {name: _mean([getattr(value, name) for value in values]) for name in names}
    counts = {name: sum(getattr(value, name) for value in values) for name in ("images", "images_present")}
    return LabelScores(**{**means, **counts})


def write_scores(scores: Iterable[MaskScore], path: Path) -> None:
    """Writes a CSV file with one row per image and label."""
    names = [field.name for field in fields(MaskScore)]
    with replacing_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "dice", "iou"])
        for score in scores:
            writer.writerow([*(getattr(score, name) for name in names), score.dice, score.iou])


def read_scores(path: Path) -> list[MaskScore]:
    """Reads a file of `write_scores`.

    Raises:
        UserError: if the file cannot be read or has another content.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [score_from_row(row) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        problem = "cannot be read" if isinstance(error, OSError) else "does not hold the scores of images"
        raise UserError(
            f"{path} {problem}; give a run's scores.csv, or what evaluate.py --scores has written."
        ) from error


def score_from_row(row: Mapping[str, str]) -> MaskScore:
    """Parses a CSV row whose values are strings."""
    distances: dict[str, Any] = {
        name: float(row[name]) if row[name] else None for name in ("hausdorff95", "surface_dice")
    }
    counts = {name: int(row[name]) for name in ("intersection", "predicted", "true")}
    return MaskScore(row["image"], row["label"], **counts, **distances, group=row["group"])


def _distances(predicted: np.ndarray, true: np.ndarray, wanted: bool) -> tuple[float | None, float | None]:
    if not wanted or not true.any():
        return None, None
    diagonal = float(np.hypot(*true.shape))
    if not predicted.any():
        return diagonal, 0.0
    p, t = (torch.from_numpy(mask)[None, None].float() for mask in (predicted, true))
    hausdorff95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95)
    surface_dice = compute_surface_dice(p, t, [TOLERANCE * diagonal], include_background=True)
    return hausdorff95.item(), surface_dice.item()


def _score(scores: Sequence[MaskScore]) -> LabelScores:
    present = [score for score in scores if score.true]
    absent = [score for score in scores if not score.true]
    pixels = sum(score.predicted + score.true for score in scores) if present else 0
    return LabelScores(
        dice=float(np.mean([score.dice for score in scores])),
        dice_present=_mean([score.dice for score in present]),
        dice_pooled=2 * sum(score.intersection for score in scores) / pixels if pixels else None,
        iou=_mean([score.iou for score in present]),
        hausdorff95=_mean([score.hausdorff95 for score in present]),
        surface_dice=_mean([score.surface_dice for score in present]),
        false_alarms=_mean([float(score.predicted > 0) for score in absent]),
        images=len(scores),
        images_present=len(present),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
