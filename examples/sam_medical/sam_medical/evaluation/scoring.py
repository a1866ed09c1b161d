"""Evaluates a trained adapter on one split, and writes tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from sam_medical.adapters.adapter import load_adapter
from sam_medical.adapters.task import read_task
from sam_medical.common.errors import UserError
from sam_medical.common.files import write_json, write_text
from sam_medical.common.process import check_processes, end_together, prepare_process
from sam_medical.data.loading import evaluation_loader
from sam_medical.data.opening import open_dataset
from sam_medical.evaluation.metrics import MaskScore, read_scores, score_labels, write_scores
from sam_medical.evaluation.prediction import evaluate, predict_masks
from sam_medical.evaluation.report import (
    draw_overlays,
    format_comparison,
    format_table,
    markdown_table,
    score_table,
    scores_as_json,
    write_table,
)
from sam_medical.evaluation.statistics import compare
from sam_medical.options.commands import EvaluateOptions


def score_adapter(options: EvaluateOptions) -> None:
    """Scores the adapter on the split, prints the table, and writes the requested files.

    Raises:
        UserError: if the adapter, the dataset or the scores of ``--against`` cannot be used.
    """
    prepare_process()
    task = read_task(Path(options.adapter))
    reading = replace(task.reading, resample_masks=options.resample_masks)
    name, fold = (task.dataset, task.fold) if options.dataset is None else (options.dataset, None)
    fold = fold if options.fold is None else options.fold
    dataset = open_dataset(name, options.data_root, options.split, list(task.labels), reading, fold)
    other = read_scores(Path(options.against)) if options.against else []
    if options.against:
        check_comparable(other, task.labels, len(dataset), options.against)
    model, task = load_adapter(Path(options.adapter), options.backbone)

    accelerator = Accelerator(mixed_precision="no")
    check_processes(accelerator)
    loader = accelerator.prepare(evaluation_loader(dataset, task.framing, options.batch_size))
    model = model.to(accelerator.device)
    scores = evaluate(accelerator, model, loader, task.labels, options.split, distances=True)
    if accelerator.is_main_process:
        by_label = score_labels(scores, task.labels, task.absent)
        print(format_table(by_label, scores))
        if options.output:
            content = {options.split: scores_as_json(by_label, scores), "adapter": options.adapter}
            write_json(Path(options.output), content)
        if options.csv:
            write_table(*score_table(by_label, scores), Path(options.csv))
        if options.markdown:
            write_text(Path(options.markdown), markdown_table(*score_table(by_label, scores)))
        if options.scores:
            write_scores(scores, Path(options.scores))
        if options.against:
            print(format_comparison(compare(scores, other), options.against))
        if options.overlays:
            images = evaluation_loader(dataset, task.framing, batch_size=1)
            draw_overlays(predict_masks(model, images), task.labels, Path(options.overlays))
    end_together(accelerator)


def check_comparable(other: Sequence[MaskScore], labels: Sequence[str], images: int, path: str) -> None:
    """Raises a `UserError` if another method's scores have other labels or another number of images."""
    other_labels, other_images = {score.label for score in other}, len({score.image for score in other})
    if other_labels != set(labels) or other_images != images:
        raise UserError(
            f"{path} is of {other_images} images and of {', '.join(sorted(other_labels))}, this evaluation of "
            f"{images} and of {', '.join(sorted(labels))}; give the scores of the same split."
        )
