"""Writes the report of a comparison: a table, a plot of Dice over trained values, and validation curves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text

from sam_medical.common.files import write_text
from sam_medical.comparison.plan import Cell, Plan
from sam_medical.comparison.results import Results
from sam_medical.evaluation.metrics import LabelScores, MaskScore, mean_dice, mean_scores, score_labels
from sam_medical.evaluation.report import (
    COLUMNS_BESIDE_DICE,
    cells_beside_dice,
    format_difference,
    format_interval,
    markdown_table,
    save_figure,
    write_table,
)
from sam_medical.evaluation.statistics import RESAMPLES, Comparison, compare, dice_by_case, holm, interval
from sam_medical.methods import METHODS
from sam_medical.options.commands import CompareOptions
from sam_medical.options.parsing import changed_options, flags_of

FIRST = "the first"
STEPS_OF_NAMES = 100
PRESENT_DIFFERENCE = f"present less {FIRST}'s"
COLUMNS = (
    "method",
    "expert's hints",
    "trained values",
    "Dice",
    "min - max of seeds",
    "95 % interval",
    *COLUMNS_BESIDE_DICE,
    f"Dice less {FIRST}'s",
    "p (Holm)",
    PRESENT_DIFFERENCE,
    "learning rate",
    "seconds per run",
    "peak memory, GB",
)


@dataclass(frozen=True)
class Row:
    """The results of one method over seeds and folds.

    Attributes:
        method: The name in `METHODS`.
        cells: The finished runs.
        dice_of_seeds: The paper's mean Dice over all folds, per seed.
        scores: The scores of every run, image and label.
        labels: The scores averaged over labels and seeds.
        by_label: The mean Dice over seeds, per label.
        trained: Number of trained values.
        seconds: Median training time per run.
        memory: Median peak memory per run, in bytes; None if unknown.
    """

    method: str
    cells: list[Cell]
    dice_of_seeds: list[float]
    scores: list[MaskScore]
    labels: LabelScores
    by_label: dict[str, float]
    trained: int
    seconds: float
    memory: float | None

    @property
    def dice(self) -> float:
        return float(np.mean(self.dice_of_seeds))


def write_report(results: Results, folder: Path) -> str:
    """Writes the report into the folder, and returns the table for the terminal."""
    rows = [row for method in results.options.method_names if (row := _row(results, method)) is not None]
    if not rows:
        text = "No method has finished a seed.\n" + _failures(results)
        write_text(folder / "README.md", text)
        return text
    columns, table = comparison_table(results.plan, rows)
    write_table(columns, table, folder / "table.csv")
    write_text(folder / "README.md", _text(results, rows, markdown_table(columns, table)))
    _draw_trained_values(rows, folder / "trained_values.png")
    _draw_curves(results, rows, folder / "curves.png")
    return markdown_table(columns, table)


def _row(results: Results, method: str) -> Row | None:
    seeds = results.done_seeds(method)
    if not seeds:
        return None
    cells = [cell for seed_cells in seeds.values() for cell in seed_cells]
    runs = [results.runs[cell] for cell in cells]
    memory = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    by_seed = [score_labels(results.scores(seed_cells), results.labels) for seed_cells in seeds.values()]
    means = {str(seed): mean_scores(scores) for seed, scores in zip(seeds, by_seed, strict=True)}
    return Row(
        method=method,
        cells=cells,
        dice_of_seeds=[mean_dice(scores) for scores in by_seed],
        scores=results.scores(cells),
        labels=mean_scores(means),
        by_label={label: float(np.mean([scores[label].dice for scores in by_seed])) for label in results.labels},
        trained=runs[0].trainable_parameters if METHODS[method].learns else 0,
        seconds=float(np.median([run.seconds for run in runs])),
        memory=float(np.median(memory)) if len(memory) == len(runs) else None,
    )


def _comparisons(rows: Sequence[Row]) -> dict[str, Comparison]:
    """Compares each method with the first, averaged over seeds, with Holm-adjusted p values."""
    found = {row.method: compare(row.scores, rows[0].scores) for row in rows[1:]}
    adjusted = holm([comparison.p_value for comparison in found.values()])
    return {method: replace(c, p_value=p) for (method, c), p in zip(found.items(), adjusted, strict=True)}


def comparison_table(plan: Plan, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns columns and rows. If every image has every label, the redundant column is left out."""
    comparisons = _comparisons(rows)
    first = METHODS[rows[0].method].title
    columns = [column.replace(FIRST, first) for column in COLUMNS]
    table = [_cells(plan, row, rows[0], comparisons.get(row.method)) for row in rows]
    if all(score.true for score in rows[0].scores):
        repeated = COLUMNS.index(PRESENT_DIFFERENCE)
        for line in (columns, *table):
            del line[repeated]
    return columns, table


def _cells(plan: Plan, row: Row, first: Row, comparison: Comparison | None) -> list[str]:
    method = METHODS[row.method]
    return [
        method.title,
        method.prompt.name if method.prompt and method.prompt.from_expert else "",
        f"{row.trained:,}",
        f"{row.dice:.3f}",
        f"{min(row.dice_of_seeds):.3f} - {max(row.dice_of_seeds):.3f} ({len(row.dice_of_seeds)})",
        format_interval(interval(dice_by_case(row.scores).values())),
        *cells_beside_dice(row.labels, ".3f"),
        "" if comparison is None else format_difference(comparison),
        "" if comparison is None else f"{comparison.p_value:.2g}",
        "" if comparison is None else format_difference(compare(_present(row.scores), _present(first.scores))),
        ", ".join(dict.fromkeys(map(plan.describe_rate, row.cells))) if method.learns else "",
        f"{row.seconds:.0f}",
        "-" if row.memory is None else f"{row.memory / 1e9:.1f}",
    ]


def _present(scores: Sequence[MaskScore]) -> list[MaskScore]:
    return [score for score in scores if score.true]


def _text(results: Results, rows: Sequence[Row], table: str) -> str:
    options, first = results.options, rows[0].cells[0]
    cases = len(dice_by_case(rows[0].scores))
    least_p = 2 / min(RESAMPLES + 1, 2**cases) * max(1, len(rows) - 1)
    environment = ", ".join(f"{name} {value}" for name, value in results.runs[first].environment.items())
    images = results.images.get(first.fold, {})
    splits = ", ".join(f"{split} {value['images']} ({value['hash']})" for split, value in images.items())
    parts = [
        f"# Methods compared on {options.dataset}",
        f"`compare.py` wrote this file. All methods: {options.steps} steps of "
        f"{options.batch_size * options.gradient_accumulation_steps} images at {options.image_size} pixels, "
        f"{options.augmentation} augmentation, backbone `{options.backbone}`, text encoder "
        f"`{options.text_encoder}`. The learning rate is the best on validation with seed 0"
        f"{', per fold' if options.folds else ''}, among {options.rate_factors} times the method's default. The "
        f"adapters are those with the best `{options.choose_by}` on the validation images.",
        _command(options),
        table,
        "Dice is the paper's: it is 1 if both masks are empty, and it is averaged over labels, images and seeds"
        f"{_dice_of_blanks(rows[0].labels)}. Intervals and p values are computed over "
        f"{cases} cases (patients, volumes or videos if the dataset has such groups, otherwise images), averaged over "
        "seeds. Intervals are bootstrap intervals. The test is a paired permutation test with Holm's correction, "
        f"whose smallest possible p value is {min(1, least_p):.2g}. HD95 is in pixels of the original images. Surface "
        f"Dice has a tolerance of 1 % of the diagonal.{_hints(rows)}",
        *_departures(rows),
        "![trained values against Dice](trained_values.png)",
        "![validation Dice](curves.png)",
    ]
    if len(rows[0].by_label) > 1:
        parts += ["Dice per label:", _label_table(rows)]
    parts += [f"Images of the first run: {splits}. {environment}."]
    return "\n\n".join(parts) + "\n" + _failures(results)


def _command(options: CompareOptions) -> str:
    """Returns the command that reproduces the report."""
    return "    python examples/sam_medical/compare.py " + shlex.join(flags_of(changed_options(options)))


def _dice_of_blanks(scores: LabelScores) -> str:
    """Describes the paper's Dice of empty predictions, if some images lack labels."""
    absent = 1 - scores.images_present / scores.images
    return f"; empty predictions would score {absent:.3f}" if absent else ""


def _hints(rows: Sequence[Row]) -> str:
    if not any(METHODS[row.method].needs_expert for row in rows):
        return ""
    return " Methods with an expert's hints know which labels each image contains, and where they are."


def _departures(rows: Sequence[Row]) -> list[str]:
    """Lists the differences from the methods' papers; empty if there are none."""
    methods = [METHODS[row.method] for row in rows]
    lines = [f"- {method.title}: {method.departs}." for method in methods if method.departs]
    return ["Differences from the papers:\n\n" + "\n".join(lines)] if lines else []


def _label_table(rows: Sequence[Row]) -> str:
    labels = list(rows[0].by_label)
    lines = [[METHODS[row.method].title, *(f"{row.by_label[label]:.3f}" for label in labels)] for row in rows]
    return markdown_table(["method", *labels], lines)


def _failures(results: Results) -> str:
    if not results.failures:
        return ""
    lines = [f"- `{name}`: {reason}" for name, reason in results.failures.items()]
    return "\nFailed runs:\n\n" + "\n".join(lines) + "\n"


def _draw_trained_values(rows: Sequence[Row], path: Path) -> None:
    """Draws the paper's Figure 4: Dice over the number of trained values."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    names = []
    for index, row in enumerate(rows):
        method = METHODS[row.method]
        colour = "tab:red" if not method.is_sam else "tab:gray" if method.needs_expert else "tab:blue"
        colour = "tab:green" if index == 0 else colour
        lengths = [row.dice - min(row.dice_of_seeds), max(row.dice_of_seeds) - row.dice]
        errors = [
            [max(0.0, length)] for length in lengths
        ]  # rounding can put the mean of equal numbers outside of their range
        axes.errorbar(row.trained, row.dice, yerr=errors, fmt="o", color=colour, capsize=3)
        names.append(axes.text(row.trained, row.dice, method.title, fontsize=8))
    axes.set_xscale("symlog", linthresh=1e4)
    axes.margins(x=0.1)
    axes.set(xlabel="trained values", ylabel="Dice on the test images; least to most of the seeds")
    axes.grid(alpha=0.3)
    # Limit the number of steps and not the time, so equal results give equal figures.
    adjust_text(names, ax=axes, expand=(1.2, 1.6), iter_lim=STEPS_OF_NAMES)
    save_figure(figure, path, dpi=120)


def _draw_curves(results: Results, rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for index, row in enumerate(rows):
        histories = [results.runs[cell].validations for cell in row.cells]
        if METHODS[row.method].learns:
            steps = [step for step, _ in histories[0]]
            dice = np.mean([[value for _, value in history] for history in histories], axis=0)
            style = ("-", "--", ":")[index // 10 % 3]
            axes.plot(steps, dice, style, color=f"C{index % 10}", label=METHODS[row.method].title)
    axes.set(xlabel="step", ylabel=f"{results.options.choose_by} of the validation images, mean of all runs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path, dpi=120)
