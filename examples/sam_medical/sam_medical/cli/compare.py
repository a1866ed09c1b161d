"""Train and evaluate several methods alike, and write one report.

    python examples/sam_medical/compare.py --config examples/sam_medical/configs/compare-glas.yaml \\
        --data-root DATA --methods s-sam,lora,samed --seeds 3 --output-dir runs/compare-glas

Every method has the same data, steps and images a step; its learning rate is chosen on the validation images of the
first seed, out of the same multiples of its usual one. The output directory gets a folder for each run, and report/:
the table (README.md, table.csv), trained values against Dice, curves, and all methods' masks side by side. It also
holds every run in four files (report.json, runs.csv, scores.csv.gz, history.csv.gz), without paths of this machine. So
it can be kept without the runs: this writes its table and figures again.

    python examples/sam_medical/compare.py --report runs/compare-glas/report

What is done is not done again: the same command goes on where it was stopped, and tries again what has failed. Its
runs save their states and end when it ends, in whatever way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sam_medical.common.errors import one_line_errors
from sam_medical.common.files import folder_in
from sam_medical.common.lock import only_command_in
from sam_medical.comparison.masks import draw_masks
from sam_medical.comparison.pack import read_pack, write_pack
from sam_medical.comparison.report import write_report
from sam_medical.comparison.runner import Bench
from sam_medical.options.options import CompareOptions, parse_options, require_folder_to_be
from sam_medical.training.process import prepare_process


@one_line_errors
def main() -> None:
    options = parse_options(CompareOptions)
    if options.report is not None:
        folder = Path(options.report)
        print(write_report(read_pack(folder), folder))
        return
    require_folder_to_be(options, "output_dir")
    with only_command_in(Path(options.output_dir)):
        compare(options)


def compare(options: CompareOptions) -> None:
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
