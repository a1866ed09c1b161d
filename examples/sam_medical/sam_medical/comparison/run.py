"""One comparison from its options to its report."""

from __future__ import annotations

import sys
from pathlib import Path

from sam_medical.common.files import folder_in
from sam_medical.comparison.masks import draw_masks
from sam_medical.comparison.pack import read_pack, write_pack
from sam_medical.comparison.report import write_report
from sam_medical.comparison.runner import Bench
from sam_medical.options.commands import CompareOptions
from sam_medical.training.process import prepare_process


def write_again(folder: Path) -> None:
    """Writes a report's table and figures from its own files."""
    print(write_report(read_pack(folder), folder))


def compare(options: CompareOptions) -> None:
    """Runs what is not done, and writes the report.

    Raises:
        SystemExit: with a message, if some runs have failed.
    """
    prepare_process()
    bench = Bench(options)
    bench.run()
    results = bench.results()
    report = folder_in(Path(options.output_dir), "report")
    write_pack(results, report)
    print(write_report(results, report))
    draw_masks(bench, results, report / "masks.png")
    print(report)
    if bench.failures:
        sys.exit(
            f"{len(bench.failures)} of the runs have failed; the report says why. Repeat the command to try again."
        )
