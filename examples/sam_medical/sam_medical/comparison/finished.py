"""Reads the finished runs in a comparison's folder, and checks that they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError
from sam_medical.comparison.plan import Cell, Plan
from sam_medical.comparison.portable import portable_options, portable_text
from sam_medical.comparison.results import Results, result_of
from sam_medical.evaluation.metrics import SCORES_FILE, read_scores
from sam_medical.options.commands import TrainOptions
from sam_medical.training.record import RECORD_FILE, RunRecord
from sam_medical.training.record import portable_options as portable_options_of_run
from sam_medical.training.run_states import FREE_OPTIONS

# Options that may differ between runs of one comparison.
OPTIONS_OF_A_RUN = {"method", "seed", "learning_rate", *FREE_OPTIONS}


class FinishedRuns:
    """The finished runs of a plan.

    Args:
        plan: The plan of all cells.
        folder: The folder with one sub-folder per cell.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def is_done(self, cell: Cell) -> bool:
        return (self.folder_of(cell) / RECORD_FILE).is_file()

    def record(self, cell: Cell) -> RunRecord:
        return RunRecord.read(self.folder_of(cell) / RECORD_FILE)

    def chosen(self) -> list[Cell]:
        """Returns the cells of all seeds, at the best learning rates among the finished candidates."""
        done = [cell for cell in self.plan.all_candidates if self.is_done(cell)]
        rates = self.plan.best_rates({cell: self.record(cell).best_dice for cell in done})
        return self.plan.with_all_seeds(rates)

    def check(self) -> None:
        """Checks that all finished runs in the folder belong to this comparison.

        Raises:
            UserError: if a run has other options, weights or images.
        """
        first_of: dict[tuple[str, str], tuple[Any, Path]] = {}
        for path in sorted(self.folder.glob(f"*/fold-*/rate-*/seed-*/{RECORD_FILE}")):
            folder, record = path.parent, RunRecord.read(path)
            fold = folder.parts[-3]
            self._check_options(record, int(fold.removeprefix("fold-")), folder)
            for key, value in {("images", fold): record.data, ("weights", ""): record.weights}.items():
                if not value:  # an old record, or a network without pretrained weights
                    continue
                first, other = first_of.setdefault(key, (value, folder))
                if first != value:
                    raise UserError(
                        f"{folder} is not of the same {key[0]} as {other}; remove the one that is wrong, or give "
                        "another --output-dir."
                    )

    def results(self, failures: Mapping[Cell, str]) -> Results:
        """Collects the results of the finished runs.

        Args:
            failures: The last output line of each failed run.
        """
        options = self.plan.options
        cells = sorted(cell for cell in {*self.plan.all_candidates, *self.chosen()} if self.is_done(cell))
        records = {cell: self.record(cell) for cell in cells}
        # `check` has verified that the shared values are equal in all runs.
        return Results(
            options=portable_options(options),
            labels=records[cells[0]].labels if cells else [],
            images={cell.fold: record.data for cell, record in records.items() if record.data},
            weights=next((record.weights for record in records.values() if record.weights), ""),
            runs={
                cell: result_of(record, read_scores(self.folder_of(cell) / SCORES_FILE))
                for cell, record in records.items()
            },
            failures={cell.name: portable_text(text, options) for cell, text in failures.items()},
        )

    def _check_options(self, record: RunRecord, fold: int, folder: Path) -> None:
        """Raises a `UserError` if a run has other options. Options missing from an old record have their defaults."""
        dataset, number = self.plan.dataset_of(fold)
        wanted = portable_options_of_run({**asdict(self.plan.options), "dataset": dataset, "fold": number})
        done = {**portable_options_of_run(asdict(TrainOptions())), **record.options}
        for name in sorted((done.keys() & wanted.keys()) - OPTIONS_OF_A_RUN):
            if done[name] != wanted[name]:
                raise UserError(
                    f"{folder} was run with {name} {done[name]!r}, and now it is {wanted[name]!r}; give another "
                    "--output-dir."
                )
