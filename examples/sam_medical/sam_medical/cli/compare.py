"""Train and evaluate several methods alike, and write one report.

    python examples/sam_medical/compare.py --config examples/sam_medical/configs/compare-glas.yaml \\
        --data-root DATA --methods s-sam,lora,samed --seeds 3 --output-dir runs/compare-glas

Every method has the same data, steps and images per step; its learning rate is chosen on the validation images of the
first seed, out of the same multiples of its usual one. The output directory gets a folder for each run, and report/:
the table (README.md, table.csv), trained values against Dice, curves, and all methods' masks side by side. It also
holds every run in four files (report.json, runs.csv, scores.csv.gz, history.csv.gz), without paths of this machine. So
it can be kept without the runs: this writes its table and figures again.

    python examples/sam_medical/compare.py --report runs/compare-glas/report

What is done is not done again: the same command goes on where it was stopped, and tries again what has failed. Its
runs save their states and end when it ends, in whatever way.
"""

from __future__ import annotations

from pathlib import Path

from sam_medical.common.errors import one_line_errors
from sam_medical.options.checks import require_folder_to_be
from sam_medical.options.commands import CompareOptions
from sam_medical.options.parsing import parse_options


@one_line_errors
def main() -> None:
    options = parse_options(CompareOptions)
    if options.report is None:
        require_folder_to_be(options, "output_dir")
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.common.lock import only_command_in
    from sam_medical.comparison.run import compare, write_again

    if options.report is not None:
        write_again(Path(options.report))
        return
    with only_command_in(Path(options.output_dir)):
        compare(options)
