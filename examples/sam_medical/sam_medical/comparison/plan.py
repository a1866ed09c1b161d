"""Which runs a comparison is made of, worked out from its options alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sam_medical.methods import METHODS
from sam_medical.options.commands import CompareOptions


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a method on a fold, with a seed and a learning rate."""

    method: str
    fold: int
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.method}/fold-{self.fold}/rate-{self.learning_rate:g}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    First each method runs on each fold with seed 0 and every learning rate to choose from. The rate that is best on
    the fold's own validation images is then run with all seeds.
    """

    options: CompareOptions

    @property
    def folds(self) -> range:
        return range(1, (self.options.folds or 1) + 1)

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every method with every fold."""
        return [(method, fold) for method in self.options.method_names for fold in self.folds]

    def dataset_of(self, fold: int) -> str:
        return self.options.dataset.replace("{fold}", str(fold))

    def seeds_of(self, method: str) -> range:
        return range(self.options.seeds if METHODS[method].is_random else 1)

    def candidates(self, method: str, fold: int) -> list[Cell]:
        """The cells by which a method's learning rate on a fold is chosen."""
        factors = self.options.factors if METHODS[method].learns else [1.0]
        base = METHODS[method].learning_rate
        return [Cell(method, fold, 0, float(f"{base * factor:.2g}")) for factor in factors]

    def best_rates(self, validation: Mapping[Cell, float]) -> dict[tuple[str, int], float]:
        """The learning rate of each method and fold that has a finished candidate.

        Args:
            validation: The best Dice on the validation images of each finished cell.
        """
        rates = {}
        for pair in self.pairs:
            done = [cell for cell in self.candidates(*pair) if cell in validation]
            if done:
                rates[pair] = max(done, key=lambda cell: validation[cell]).learning_rate
        return rates

    def with_all_seeds(self, rates: Mapping[tuple[str, int], float]) -> list[Cell]:
        """The cells at these learning rates."""
        return [Cell(*pair, seed, rate) for pair, rate in rates.items() for seed in self.seeds_of(pair[0])]

    def describe_rate(self, cell: Cell) -> str:
        """The cell's learning rate, and whether it is an end of those tried, beyond which may lie a better one."""
        rates = sorted(candidate.learning_rate for candidate in self.candidates(cell.method, cell.fold))
        ends = {rates[0]: " (lowest tried)", rates[-1]: " (highest tried)"} if len(rates) > 1 else {}
        return f"{cell.learning_rate:g}{ends.get(cell.learning_rate, '')}"
