"""Score a trained adapter, reloaded on its own, and print the table again.

    python examples/sam_medical/evaluate.py --adapter runs/demo/adapter --split test --output metrics.json

The scores are computed in full precision, as train.py's are, whatever the adapter was trained in.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from ssam.adapter import load_adapter, read_task
from ssam.data import open_dataset
from ssam.data.loading import evaluation_loader
from ssam.errors import one_line_errors
from ssam.evaluation import evaluate, predict_masks
from ssam.files import write_json
from ssam.metrics import score_labels
from ssam.options import EvaluateOptions, parse_options
from ssam.report import draw_overlays, format_table, scores_as_json
from ssam.runtime import check_processes, end_together, prepare_process


@one_line_errors
def main() -> None:
    options = parse_options(EvaluateOptions)
    prepare_process()
    task = read_task(Path(options.adapter))
    dataset = open_dataset(options.dataset or task.dataset, options.data_root, options.split, list(task.labels))
    model, text_embeddings, task = load_adapter(Path(options.adapter), options.backbone)

    accelerator = Accelerator(mixed_precision="no")
    check_processes(accelerator)
    loader = accelerator.prepare(evaluation_loader(dataset, task.image_size, options.batch_size))
    model, text_embeddings = model.to(accelerator.device), text_embeddings.to(accelerator.device)
    scores = score_labels(
        evaluate(accelerator, model, loader, text_embeddings, task.labels, options.split), task.labels
    )
    if accelerator.is_main_process:
        write_json(Path(options.output), {options.split: scores_as_json(scores), "adapter": options.adapter})
        print(format_table(scores))
        if options.overlays:
            images = evaluation_loader(dataset, task.image_size, batch_size=1)
            draw_overlays(predict_masks(model, images, text_embeddings), task.labels, Path(options.overlays))
    end_together(accelerator)


if __name__ == "__main__":
    main()
