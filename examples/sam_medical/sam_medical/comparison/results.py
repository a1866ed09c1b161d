"""The results of a comparison, from which its tables and curves are made, wherever they were read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sam_medical.comparison.plan import Cell, Plan
from sam_medical.evaluation.metrics import MaskScore
from sam_medical.options.commands import CompareOptions
from sam_medical.training.record import RunRecord

LOSS = "loss"
VALIDATION = "validation"


@dataclass(frozen=True)
class Moment:
    """One number of a run's course.

    Attributes:
        step: The number of updates so far.
        label: The label that it belongs to; empty for all together.
        name: `LOSS`, `VALIDATION` (by which the adapter is chosen), or a field of `LabelScores` on validation.
        value: The number.
    """

    step: int
    label: str
    name: str
    value: float


@dataclass(frozen=True)
class RunResult:
    """What one finished run gave.

    Attributes:
        best_dice, best_step: The validation that chose the adapter.
        test_dice: The paper's average over the test images.
        trainable_parameters: How many values learn.
        seconds: Time of training.
        peak_memory_bytes: None where the system does not tell.
        processes: How many trained together.
        environment: Versions and device.
        scores: The scores of each test image and label, in the dataset's order.
        history: The run's course, step by step.
    """

    best_dice: float
    best_step: int
    test_dice: float
    trainable_parameters: int
    seconds: float
    peak_memory_bytes: int | None
    processes: int
    environment: dict[str, str]
    scores: list[MaskScore]
    history: list[Moment]

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Step and Dice of each validation."""
        return [(moment.step, moment.value) for moment in self.history if moment.name == VALIDATION]


@dataclass(frozen=True)
class Results:
    """All finished runs of a comparison, and what they share.

    Attributes:
        options: What was compared, without places of the machine that did it.
        labels: The labels in the dataset's order.
        images: How many images each fold's splits have, and their digests.
        weights: The digest of the pretrained weights.
        runs: Each finished run.
        failures: What each failed run said last, by its name.
    """

    options: CompareOptions
    labels: list[str]
    images: dict[int, dict[str, Any]]
    weights: str
    runs: dict[Cell, RunResult]
    failures: dict[str, str]

    @property
    def plan(self) -> Plan:
        return Plan(self.options)

    @cached_property
    def rates(self) -> dict[tuple[str, int], float]:
        """The chosen learning rate of each method and fold."""
        return self.plan.best_rates({cell: run.best_dice for cell, run in self.runs.items()})

    def done_seeds(self, method: str) -> dict[int, list[Cell]]:
        """For each seed that is done on all folds, its cells at the chosen learning rates."""
        plan = self.plan
        if not all((method, fold) in self.rates for fold in plan.folds):
            return {}
        by_seed = {
            seed: [Cell(method, fold, seed, self.rates[method, fold]) for fold in plan.folds]
            for seed in plan.seeds_of(method)
        }
        return {seed: cells for seed, cells in by_seed.items() if all(cell in self.runs for cell in cells)}

    def scores(self, cells: Iterable[Cell]) -> list[MaskScore]:
        """The scores of all images that these cells were tested on."""
        return [score for cell in cells for score in self.runs[cell].scores]


def result_of(record: RunRecord, scores: list[MaskScore]) -> RunResult:
    """A run's result out of its record and the scores of its test images."""
    return RunResult(
        best_dice=record.best_dice,
        best_step=record.best_step,
        test_dice=float(record.test["mean_dice"]),
        trainable_parameters=record.trainable_parameters,
        seconds=record.seconds,
        peak_memory_bytes=record.peak_memory_bytes,
        processes=record.processes,
        environment=record.environment,
        scores=scores,
        history=list(_moments(record.history)),
    )


def _moments(history: Mapping[str, Any]) -> Iterable[Moment]:
    validations = history["validations"]
    for step, loss in enumerate(history["losses"], start=1):
        yield Moment(step, "", LOSS, float(loss))
    for step, dice in validations:
        yield Moment(step, "", VALIDATION, float(dice))
    for (step, _), scores in zip(validations, history["label_scores"], strict=False):
        for label, values in scores.items():
            yield from (Moment(step, label, name, float(value)) for name, value in values.items() if value is not None)
