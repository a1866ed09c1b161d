"""Runs a comparison, or rewrites its report."""

from __future__ import annotations

import sys
from pathlib import Path

from sam_medical.common.files import folder_in
from sam_medical.common.process import prepare_process
from sam_medical.comparison.finished import FinishedRuns
from sam_medical.comparison.masks import draw_masks
from sam_medical.comparison.pack import read_pack, write_pack
from sam_medical.comparison.plan import Plan
from sam_medical.comparison.report import write_report
from sam_medical.comparison.runner import Runner
from sam_medical.data import DATASETS, dataset_and_fold
from sam_medical.data.opening import open_splits
from sam_medical.options.checks import require
from sam_medical.options.commands import CompareOptions


def write_again(folder: Path) -> None:
    """Rewrites the table and figures of a report from its own files. Raises as `read_pack`."""
    print(write_report(read_pack(folder), folder))


def compare(options: CompareOptions) -> None:
    """Runs the unfinished runs, and writes the report.

    Raises:
        UserError: if the data cannot be read, or the folder contains other runs.
        SystemExit: with a message, if some runs have failed.
    """
    prepare_process()
    plan = Plan(options)
    check_data(plan)
    finished = FinishedRuns(plan, Path(options.output_dir))
    finished.check()
    runner = Runner(finished)
    runner.run()
    finished.check()

    results = finished.results(runner.failures)
    report = folder_in(finished.folder, "report")
    write_pack(results, report)
    print(write_report(results, report))
    draw_masks(finished, results, report / "masks.png")
    print(report)
    if runner.failures:
        sys.exit(
            f"{len(runner.failures)} of the runs have failed; the report says why. Repeat the command to try again."
        )


def check_data(plan: Plan) -> None:
    """Raises a `UserError` if the images of a fold do not exist, or the number of folds is missing."""
    options = plan.options
    name, fold = dataset_and_fold(options.dataset)
    if name in DATASETS and fold is None and options.folds is None:
        folds = DATASETS[name].folds
        require(options, "folds", not folds, f"must be from 1 to {folds}, the folds of {name}")
    for number in plan.folds:
        name, fold = plan.dataset_of(number)
        open_splits(name, options.data_root, options.labels, options.reading, fold)
