"""Train S-SAM: one small adapter that lets SAM segment what a label's name says.

The demo, on a brain MRI that needs no download:

    python examples/sam_medical/train.py --config examples/sam_medical/configs/demo.yaml --output-dir runs/demo

GlaS, on a GPU in bfloat16, from SAM's ViT-B and CLIP:

    accelerate launch examples/sam_medical/train.py --config examples/sam_medical/configs/glas.yaml \\
        --data-root /data/glas --backbone facebook/sam-vit-base --text-encoder openai/clip-vit-base-patch32 \\
        --image-size 256 --mixed-precision bf16 --output-dir runs/glas

With --method it trains any other of the methods that S-SAM is compared with. The run leaves in the output directory:
adapter/ (the best on validation), metrics.json, scores.csv, history.json, curves.png, overlays/. After Ctrl-C it can
go on: repeat the command with --resume.
"""

from __future__ import annotations

import time
from pathlib import Path

from sam_medical.common.errors import one_line_errors
from sam_medical.options.checks import require_folder_to_be
from sam_medical.options.commands import TrainOptions
from sam_medical.options.parsing import parse_options


@one_line_errors
def main() -> None:
    started = time.monotonic()
    options = parse_options(TrainOptions)
    require_folder_to_be(options, "output_dir")
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.common.lock import only_command_in
    from sam_medical.common.signals import end_with_parent
    from sam_medical.training.run import run

    end_with_parent()
    with only_command_in(Path(options.output_dir)):
        run(options, started)
