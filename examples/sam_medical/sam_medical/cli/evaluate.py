"""Score a trained adapter, reloaded on its own, and print the table again.

    python examples/sam_medical/evaluate.py --adapter runs/demo/adapter --split test --output metrics.json

The scores are computed in full precision, as train.py's are, whatever the adapter was trained in. With --against it
tests the difference from another method's scores, case by case:

    python examples/sam_medical/evaluate.py --adapter runs/glas/adapter --data-root DATA --against runs/lora/scores.csv
"""

from __future__ import annotations

from sam_medical.common.errors import one_line_errors
from sam_medical.options.commands import EvaluateOptions
from sam_medical.options.parsing import parse_options


@one_line_errors
def main() -> None:
    options = parse_options(EvaluateOptions)
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.evaluation.scoring import score_adapter

    score_adapter(options)
