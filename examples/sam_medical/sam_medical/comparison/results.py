"""The results of a comparison, read from run folders or from a report's files."""

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
    """One logged number of a run.

    Attributes:
        step: Number of updates so far.
        label: The label; empty for numbers over all labels.
        name: `LOSS`, `VALIDATION` (the score that chooses the adapter), or a field of `LabelScores` on validation.
        value: The number.
    """

    step: int
    label: str
    name: str
    value: float


@dataclass(frozen=True)
class RunResult:
    """The result of one finished run.

    Attributes:
        best_dice: The validation score that chose the adapter.
        best_step: The step of that validation.
        test_dice: The paper's mean Dice over the test images.
        trainable_parameters: Number of trained values.
        seconds: Training time.
        peak_memory_bytes: Peak memory; None if the system does not report it.
        processes: Number of processes that trained together.
        environment: Versions and device.
        scores: The scores of each test image and label, in the dataset's order.
        history: The logged numbers, step by step.
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
        """The (step, score) pairs of the validations."""
        return [(moment.step, moment.value) for moment in self.history if moment.name == VALIDATION]


@dataclass(frozen=True)
class Results:
    """All finished runs of a comparison, and the values that they share.

    Attributes:
        options: The options of the comparison, without local paths.
        labels: The labels in the dataset's order.
        images: Per fold, the number of images and the digest of each split.
        weights: The digest of the pretrained weights.
        runs: The finished runs.
        failures: The last output line of each failed run, by the run's name.
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
        """The best learning rate per method and fold."""
        return self.plan.best_rates({cell: run.best_dice for cell, run in self.runs.items()})

    def done_seeds(self, method: str) -> dict[int, list[Cell]]:
        """Returns the cells at the best learning rates, for each seed that is finished on all folds."""
        plan = self.plan
        if not all((method, fold) in self.rates for fold in plan.folds):
            return {}
        by_seed = {
            seed: [Cell(method, fold, seed, self.rates[method, fold]) for fold in plan.folds]
            for seed in plan.seeds_of(method)
        }
        return {seed: cells for seed, cells in by_seed.items() if all(cell in self.runs for cell in cells)}

    def scores(self, cells: Iterable[Cell]) -> list[MaskScore]:
        """Returns the test scores of these cells."""
        return [score for cell in cells for score in self.runs[cell].scores]


def result_of(record: RunRecord, scores: list[MaskScore]) -> RunResult:
    """Builds a run's result from its record and its test scores."""
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
