"""The runs of a comparison, derived from its options alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sam_medical.methods import METHODS
from sam_medical.options.commands import CompareOptions, TrainOptions


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a method, a fold, a seed and a learning rate."""

    method: str
    fold: int
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The folder of the run. The colon of ``package.module:NAME`` is replaced: Windows does not allow it."""
        return f"{self.method.replace(':', '.')}/fold-{self.fold}/rate-{self.learning_rate:g}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    First, each method runs on each fold with seed 0 and every candidate learning rate. The best rate on the fold's
    validation images is then used for all seeds.
    """

    options: CompareOptions

    @property
    def folds(self) -> range:
        """The folds, starting at 1. A dataset without folds has one."""
        return range(1, (self.options.folds or 1) + 1)

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """All pairs of a method and a fold."""
        return [(method, fold) for method in self.options.method_names for fold in self.folds]

    def dataset_of(self, fold: int) -> tuple[str, int | None]:
        """Returns the name of the dataset and its fold; None for the fold if it has none.

        In older comparisons, the name contains the fold as ``{fold}``.
        """
        name = self.options.dataset
        if "{fold}" in name:
            return name.replace("{fold}", str(fold)), None
        return name, None if self.options.folds is None else fold

    def seeds_of(self, method: str) -> range:
        return range(self.options.seeds if METHODS[method].is_random else 1)

    def candidates(self, method: str, fold: int) -> list[Cell]:
        """Returns the cells that determine a method's learning rate on a fold."""
        factors = self.options.factors if METHODS[method].learns else [1.0]
        base = METHODS[method].learning_rate
        return [Cell(method, fold, 0, float(f"{base * factor:.2g}")) for factor in factors]

    @property
    def all_candidates(self) -> list[Cell]:
        """The cells that determine all learning rates."""
        return [cell for pair in self.pairs for cell in self.candidates(*pair)]

    def best_rates(self, validation: Mapping[Cell, float]) -> dict[tuple[str, int], float]:
        """Returns the best learning rate of each method and fold with a finished candidate.

        Args:
            validation: The best validation score of each finished cell.
        """
        rates = {}
        for pair in self.pairs:
            done = [cell for cell in self.candidates(*pair) if cell in validation]
            if done:
                rates[pair] = max(done, key=lambda cell: validation[cell]).learning_rate
        return rates

    def with_all_seeds(self, rates: Mapping[tuple[str, int], float]) -> list[Cell]:
        """Returns the cells of all seeds at these learning rates."""
        return [Cell(*pair, seed, rate) for pair, rate in rates.items() for seed in self.seeds_of(pair[0])]

    def train_options(self, cell: Cell) -> dict[str, Any]:
        """Returns the options of the command ``train`` for a cell, except for the output folder."""
        names = {field.name for field in fields(TrainOptions)} - {"output_dir"}
        shared = {name: value for name, value in asdict(self.options).items() if name in names}
        dataset, fold = self.dataset_of(cell.fold)
        own = {"method": cell.method, "seed": cell.seed, "learning_rate": cell.learning_rate}
        return {**shared, "dataset": dataset, "fold": fold, **own}

    def describe_rate(self, cell: Cell) -> str:
        """Formats a cell's learning rate. The extreme candidates are marked: a better rate may lie beyond them."""
        rates = sorted(candidate.learning_rate for candidate in self.candidates(cell.method, cell.fold))
        ends = {rates[0]: " (lowest tried)", rates[-1]: " (highest tried)"} if len(rates) > 1 else {}
        return f"{cell.learning_rate:g}{ends.get(cell.learning_rate, '')}"
