"""Tables and figures of a run: scores, curves, overlays and contact sheets."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from sam_medical.common.files import replacing_file
from sam_medical.data.base import Sample
from sam_medical.evaluation.metrics import LabelScores, MaskScore, mean_dice, mean_scores
from sam_medical.evaluation.statistics import Case, Comparison, dice_by_case, interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

SMOOTHING = 0.9
# Largest longer side of a drawn image, in pixels.
MOST_SHOWN = 1000
# Smallest ratio of the shorter side to the longer one. Thinner images are stretched.
LEAST_ASPECT = 0.2
COLUMNS_BESIDE_DICE = ("present", "pooled", "IoU", "HD95", "surface Dice", "false alarms")
COLUMNS = ("label", "Dice", "95 % interval", *COLUMNS_BESIDE_DICE, "images with it")


def score_table(
    by_label: Mapping[str, LabelScores], scores: Sequence[MaskScore]
) -> tuple[Sequence[str], list[list[str]]]:
    """Returns columns and rows: the scores of each label, and their mean.

    Args:
        by_label: The scores of each label.
        scores: The scores of each image and label, for the intervals.
    """
    rows = []
    for label, label_scores in by_label.items():
        dice = dice_by_case(score for score in scores if score.label == label)
        present = f"{label_scores.images_present} of {label_scores.images}"
        rows.append([label, *_cells(label_scores.dice, dice, label_scores), present])
    average = mean_scores(by_label)
    rows.append(["mean", *_cells(average.dice, dice_by_case(_trained(scores, by_label)), average), ""])
    return COLUMNS, rows


def _trained(scores: Sequence[MaskScore], by_label: Mapping[str, LabelScores]) -> list[MaskScore]:
    """Returns the scores of labels that occur in training images."""
    return [score for score in scores if by_label[score.label].trained]


def _cells(dice: float, dice_of_cases: Mapping[str, Case], score: LabelScores) -> list[str]:
    return [f"{dice:.4f}", format_interval(interval(dice_of_cases.values())), *cells_beside_dice(score, ".4f")]


def cells_beside_dice(score: LabelScores, form: str) -> list[str]:
    """Returns the cells of `COLUMNS_BESIDE_DICE`. ``form`` is the format of shares."""
    values = [score.dice_present, score.dice_pooled, score.iou, score.hausdorff95, score.surface_dice]
    forms = [form, form, form, ".1f", form]
    cells = ["-" if value is None else f"{value:{form}}" for value, form in zip(values, forms, strict=True)]
    return [*cells, "-" if score.false_alarms is None else f"{100 * score.false_alarms:.0f} %"]


def format_interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.3f} - {bounds[1]:.3f}"


def format_table(by_label: Mapping[str, LabelScores], scores: Sequence[MaskScore]) -> str:
    """Formats the scores as a table for the terminal."""
    columns, rows = score_table(by_label, scores)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *rows]
    ]
    untrained = [label for label, score in by_label.items() if not score.trained]
    if untrained:
        lines.append(f"Not in any training image, and not in the mean: {', '.join(untrained)}.")
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]], path: Path) -> None:
    """Writes a table as CSV."""
    with replacing_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def format_comparison(comparison: Comparison, other: str) -> str:
    return (
        f"Dice {format_difference(comparison)} beside {other}, p = {comparison.p_value:.2g} (paired permutation test, "
        f"{comparison.cases} cases)"
    )


def format_difference(comparison: Comparison) -> str:
    if comparison.low is None:
        return f"{comparison.difference:+.4f}"
    return f"{comparison.difference:+.4f} ({comparison.low:+.4f} to {comparison.high:+.4f})"


def scores_as_json(by_label: dict[str, LabelScores], scores: Sequence[MaskScore]) -> dict[str, Any]:
    return {
        "mean_dice": mean_dice(by_label),
        "mean_dice_interval": interval(dice_by_case(_trained(scores, by_label)).values()),
        "labels": {label: asdict(score) for label, score in by_label.items()},
    }


def draw_curves(losses: Sequence[float], validations: Sequence[tuple[int, float]], path: Path) -> None:
    """Draws the training loss per step, and below it the validation Dice from (step, Dice) pairs."""
    figure, (loss_axes, dice_axes) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, constrained_layout=True)
    steps = np.arange(1, len(losses) + 1)
    loss_axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    loss_axes.plot(steps, _smoothed(losses), color="tab:blue", label="smoothed")
    loss_axes.set(ylabel="training loss", ylim=(0, None))
    loss_axes.legend()
    dice_axes.plot(*zip(*validations, strict=True), color="tab:green", marker="o")
    dice_axes.set(xlabel="step", ylabel="validation Dice", ylim=(0, 1))
    dice_axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path, dpi=120)


def draw_overlays(predictions: Iterable[tuple[Sample, np.ndarray]], labels: Sequence[str], folder: Path) -> None:
    """Draws one PNG per sample: the image, its true masks and its predicted masks, bool (K, H, W)."""
    for sample, predicted in predictions:
        _draw_overlay(sample, predicted, labels, folder / f"{sample.name}.png")


def draw_contact_sheet(samples_of_split: Mapping[str, tuple[Sequence[Sample], Sequence[str]]], path: Path) -> None:
    """Draws one PNG with a row of samples per split, with their true masks.

    Args:
        samples_of_split: The samples of each split, and the labels of their masks.
        path: The output file.
    """
    columns = max(len(samples) for samples, _ in samples_of_split.values())
    size = (2.2 * columns, 2.4 * len(samples_of_split) + 0.6)
    figure, axes = plt.subplots(len(samples_of_split), columns, figsize=size, squeeze=False, constrained_layout=True)
    for panel in axes.flat:
        panel.set_axis_off()
    for row, (split, (samples, labels)) in zip(axes, samples_of_split.items(), strict=True):
        for panel, sample in zip(row, samples, strict=False):
            _show(panel, sample.image, sample.masks, labels)
            panel.set_title(f"{split}: {sample.name}", fontsize=6)
    labels = next(iter(samples_of_split.values()))[1]
    _add_legend(figure, labels)
    save_figure(figure, path, dpi=100)


def draw_grid(
    samples: Sequence[Sample], columns: Mapping[str, Sequence[np.ndarray]], labels: Sequence[str], path: Path
) -> None:
    """Draws one PNG with a row per sample: the image, then the masks (K, H, W) of each column on it."""
    width = len(columns) + 1
    figure, axes = plt.subplots(
        len(samples), width, figsize=(2 * width, 2 * len(samples) + 0.6), squeeze=False, constrained_layout=True
    )
    for panel in axes.flat:
        panel.set_axis_off()
    for row, sample in enumerate(samples):
        _show(axes[row, 0], sample.image, sample.masks[:0], labels)
        axes[0, 0].set_title("image", fontsize=8)
        for column, (title, masks) in enumerate(columns.items(), start=1):
            panel = axes[row, column]
            _show(panel, sample.image, masks[row], labels)
            if row == 0:
                panel.set_title(title, fontsize=8)
    _add_legend(figure, labels)
    save_figure(figure, path, dpi=100)


def save_figure(figure: plt.Figure, path: Path, dpi: int) -> None:
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def _add_legend(figure: plt.Figure, labels: Sequence[str]) -> None:
    handles = [Patch(color=colour, label=label) for colour, label in zip(_colours(labels), labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=8)


def _draw_overlay(sample: Sample, predicted: np.ndarray, labels: Sequence[str], path: Path) -> None:
    height, width = sample.image.shape[:2]
    shape = min(max(height / width, LEAST_ASPECT), 1 / LEAST_ASPECT)
    figure, axes = plt.subplots(1, 3, figsize=(12, 12 / 3 * shape + 0.6), constrained_layout=True)
    contents = {"image": predicted[:0], "truth": sample.masks, "prediction": predicted}
    for panel, (title, masks) in zip(axes, contents.items(), strict=True):
        _show(panel, sample.image, masks, labels)
        panel.set_title(title)
        panel.set_axis_off()
    _add_legend(figure, labels)
    save_figure(figure, path, dpi=80)


def _show(panel: Any, image: np.ndarray, masks: np.ndarray, labels: Sequence[str]) -> None:
    """Draws an image with its masks, downsampled to what a panel can show."""
    height, width = image.shape[:2]
    rows, columns = _places(height, max(height, width)), _places(width, max(height, width))
    is_thin = min(height, width) < LEAST_ASPECT * max(height, width)
    panel.imshow(image[rows][:, columns], aspect="auto" if is_thin else "equal")
    for mask, colour in zip(masks, _colours(labels), strict=False):
        _paint(panel, mask[rows][:, columns], colour, "auto" if is_thin else "equal")


def overlay(image: np.ndarray, masks: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """An image (H, W, 3) between zero and one with masks (K, H, W) painted on it, and a legend."""
    height, width = image.shape[:2]
    shape = min(max(height / width, LEAST_ASPECT), 1 / LEAST_ASPECT)
    figure, panel = plt.subplots(figsize=(6, 6 * shape + 0.5), constrained_layout=True)
    _show(panel, image, masks, labels)
    panel.set_axis_off()
    _add_legend(figure, labels)
    with BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100)
        plt.close(figure)
        return Image.open(buffer).convert("RGB")


def shrunk(sample: Sample) -> Sample:
    """Downsamples a sample to the size at which it is drawn, to save memory."""
    height, width = sample.image.shape[:2]
    rows, columns = _places(height, max(height, width)), _places(width, max(height, width))
    return replace(sample, image=sample.image[rows][:, columns], masks=sample.masks[:, rows][:, :, columns])


def _places(side: int, longer: int) -> np.ndarray:
    """Returns the pixel indices of a side that are drawn: at least two, because contours need two."""
    shown = max(2, round(side * min(1.0, MOST_SHOWN / longer)))
    return ((np.arange(shown) + 0.5) * side / shown).astype(int)


def _colours(labels: Sequence[str]) -> list[Any]:
    """Returns a colour per label. Colours repeat after twenty labels."""
    colormap = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    return [colormap(index % colormap.N)[:3] for index in range(len(labels))]


def _paint(axes: Any, mask: np.ndarray, colour: Sequence[float], aspect: str) -> None:
    """Draws a mask as a translucent area with an outline."""
    if mask.any():
        area = np.zeros((*mask.shape, 4))
        area[mask] = (*colour, 0.35)
        axes.imshow(area, aspect=aspect)
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns the bias-corrected exponential moving average."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result
