"""What a run leaves to read and to look at: a table, numbers, curves and overlays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ssam.data.base import Sample
from ssam.files import replacing_file
from ssam.metrics import LabelScores, mean_dice

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

SMOOTHING = 0.9


def format_table(scores: dict[str, LabelScores]) -> str:
    """The scores as a table for the terminal."""
    width = max(len("label"), *(len(label) for label in scores), len("mean"))
    lines = [f"{'label':<{width}}   Dice   present   pooled   images with it"]
    for label, score in scores.items():
        present = "   -  " if score.dice_present is None else f"{score.dice_present:.4f}"
        lines.append(
            f"{label:<{width}}  {score.dice:.4f}  {present}   {score.dice_pooled:.4f}   "
            f"{score.images_present} of {score.images}"
        )
    lines.append(f"{'mean':<{width}}  {mean_dice(scores):.4f}")
    return "\n".join(lines)


def scores_as_json(scores: dict[str, LabelScores]) -> dict[str, Any]:
    return {"mean_dice": mean_dice(scores), "labels": {label: asdict(score) for label, score in scores.items()}}


def draw_curves(losses: Sequence[float], validations: Sequence[tuple[int, float]], path: Path) -> None:
    """Training loss at each step, and the validation Dice at the (step, Dice) pairs, one above the other."""
    figure, (loss_axes, dice_axes) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, constrained_layout=True)
    steps = np.arange(1, len(losses) + 1)
    loss_axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    loss_axes.plot(steps, _smoothed(losses), color="tab:blue", label="smoothed")
    loss_axes.set(ylabel="training loss", ylim=(0, None))
    loss_axes.legend()
    dice_axes.plot(*zip(*validations, strict=True), color="tab:green", marker="o")
    dice_axes.set(xlabel="step", ylabel="validation Dice", ylim=(0, 1))
    dice_axes.grid(axis="y", alpha=0.3)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def draw_overlays(predictions: Iterable[tuple[Sample, np.ndarray]], labels: Sequence[str], folder: Path) -> None:
    """One PNG a sample, by its name: the image, its true masks and the predicted ones."""
    for sample, predicted in predictions:
        with replacing_file(folder / f"{sample.name}.png") as temporary:
            _draw_overlay(sample, predicted, labels, temporary)


def draw_contact_sheet(samples_of_split: Mapping[str, tuple[Sequence[Sample], Sequence[str]]], path: Path) -> None:
    """One PNG: a row of samples a split, with their true masks.

    Args:
        samples_of_split: The samples of each split, and the labels of their masks.
        path: Where the picture goes.
    """
    columns = max(len(samples) for samples, _ in samples_of_split.values())
    size = (2.2 * columns, 2.4 * len(samples_of_split) + 0.6)
    figure, axes = plt.subplots(len(samples_of_split), columns, figsize=size, squeeze=False, constrained_layout=True)
    for panel in axes.flat:
        panel.set_axis_off()
    for row, (split, (samples, labels)) in zip(axes, samples_of_split.items(), strict=True):
        for panel, sample in zip(row, samples, strict=False):
            panel.imshow(sample.image)
            panel.set_title(f"{split}: {sample.name}", fontsize=6)
            for mask, colour in zip(sample.masks, _colours(labels), strict=True):
                _paint(panel, mask, colour)
    labels = next(iter(samples_of_split.values()))[1]
    handles = [Patch(color=colour, label=label) for colour, label in zip(_colours(labels), labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=7)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def _draw_overlay(sample: Sample, predicted: np.ndarray, labels: Sequence[str], path: Path) -> None:
    height, width = sample.image.shape[:2]
    figure, axes = plt.subplots(1, 3, figsize=(12, 12 / 3 * height / width + 0.6), constrained_layout=True)
    colours = _colours(labels)
    contents = {"image": np.zeros_like(predicted), "truth": sample.masks, "prediction": predicted}
    for panel, (title, masks) in zip(axes, contents.items(), strict=True):
        panel.imshow(sample.image)
        panel.set_title(title)
        panel.set_axis_off()
        for mask, colour in zip(masks, colours, strict=True):
            _paint(panel, mask, colour)
    handles = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png", dpi=80)
    plt.close(figure)


def _colours(labels: Sequence[str]) -> list[Any]:
    """A colour for each label; twenty before they come again."""
    colormap = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    return [colormap(index % colormap.N)[:3] for index in range(len(labels))]


def _paint(axes: Any, mask: np.ndarray, colour: Sequence[float]) -> None:
    """A translucent area with a clear outline."""
    if mask.any():
        area = np.zeros((*mask.shape, 4))
        area[mask] = (*colour, 0.35)
        axes.imshow(area)
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average, not biased towards its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result
