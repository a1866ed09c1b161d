"""A training run: opens the data, builds the model, trains it, and scores the best adapter."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from sam_medical.adapters.adapter import load_adapter
from sam_medical.adapters.building import build_model
from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.common.files import folder_in, refuse_link, remove, restore
from sam_medical.common.process import check_processes, end_together, prepare_process
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.loading import evaluation_loader, thinned
from sam_medical.data.offset import NONE, in_words
from sam_medical.data.opening import open_splits, settle_reading
from sam_medical.data.reading import Reading
from sam_medical.data.sides import labels_with_a_side
from sam_medical.data.survey import Survey, warnings_of
from sam_medical.evaluation.metrics import SCORES_FILE, MaskScore, score_labels, write_scores
from sam_medical.evaluation.prediction import evaluate, predict_masks
from sam_medical.evaluation.report import draw_curves, draw_overlays, format_table, scores_as_json
from sam_medical.methods.tuning import count_trainable
from sam_medical.models.text import check_distinct, encode_labels
from sam_medical.options.commands import TrainOptions
from sam_medical.training.accelerator import make_accelerator
from sam_medical.training.measures import check_images, environment, peak_memory
from sam_medical.training.record import RECORD_FILE, RunRecord, record_of_run
from sam_medical.training.run_states import CHECKPOINT, check_states
from sam_medical.training.trainer import Run, Trainer


def run(options: TrainOptions, started: float) -> None:
    """Trains a model, scores the best adapter on the test images, and writes all results to the output folder.

    Args:
        options: The options of the run.
        started: Start of the command, from `time.monotonic`.

    Raises:
        UserError: if the options, the data, the model or the output folder cannot be used.
        SystemExit: with 128 plus the signal number, if a signal has stopped the run.
    """
    output = Path(options.output_dir)
    restore(output / "adapter")
    check_output(output, options)
    prepare_process()
    accelerator = make_accelerator(options)
    check_processes(accelerator)
    set_seed(options.seed)

    splits = open_splits(options.dataset, options.data_root, options.labels, options.reading, options.fold)
    reading = settle_splits(splits)
    task = Task.from_options(options, options.method, splits["train"].labels, reading)
    text_embeddings = encode_labels(task.text_encoder, task.labels) if task.uses_text else None
    if text_embeddings is not None:
        check_distinct(text_embeddings, task.labels, task.text_encoder)
    model, task = build_model(task, text_embeddings)
    surveys = {split: Survey(dataset.labels, options.framing) for split, dataset in splits.items()}
    data = check_images(splits, surveys)
    task = replace(task, absent=tuple(surveys["train"].absent()))
    if set(task.absent) == set(task.labels):
        raise UserError(f"no training image has any of the labels {', '.join(task.labels)}; add some that do.")
    for note in notes_before_training(splits["train"], surveys, options):
        accelerator.print(f"note: {note}.")

    trainer = Trainer(Run(options, task, splits, data, text_embeddings, accelerator, started), model)
    signal_number = trainer.fit()
    if signal_number:
        accelerator.print(f"Stopped after step {trainer.progress.step}; repeat the command with --resume to go on.")
        end_together(accelerator)
        sys.exit(128 + signal_number)

    memory = peak_memory(accelerator.device)
    scores = score_best_adapter(accelerator, splits["test"], options)
    if accelerator.is_main_process:
        by_label = score_labels(scores, task.labels, task.absent)
        record = record_of_run(
            trainer.progress,
            asdict(options),
            test=scores_as_json(by_label, scores),
            trainable_parameters=count_trainable(model),
            peak_memory_bytes=memory,
            data=data,
            weights=task.backbone_digest,
            environment=environment(accelerator.device),
            processes=accelerator.num_processes,
        )
        finish(output, record, scores)
        print(format_table(by_label, scores))
        for name in ("adapter", RECORD_FILE, SCORES_FILE, "curves.png", "overlays"):
            if (output / name).exists():
                print(f"{name:<12} {output / name}")
    end_together(accelerator)


def finish(output: Path, record: RunRecord, scores: Sequence[MaskScore]) -> None:
    """Writes the files of a finished run. The record is written last, because it marks the run as finished."""
    write_scores(scores, output / SCORES_FILE)
    if record.history["losses"]:
        draw_curves(record.history["losses"], record.history["validations"], output / "curves.png")
    record.write(output / RECORD_FILE)
    remove(output / CHECKPOINT)


def settle_splits(splits: Mapping[str, SegmentationDataset]) -> Reading:
    """Resolves ``auto`` in the reading from the training images, sets it for all splits, and returns it."""
    reading = settle_reading(splits["train"])
    for dataset in splits.values():
        dataset.reading = replace(dataset.reading, intensity=reading.intensity, offset=reading.offset)
    return reading


def notes_before_training(
    dataset: SegmentationDataset, surveys: Mapping[str, Survey], options: TrainOptions
) -> list[str]:
    notes = list(dataset.notes)
    if dataset.reading.intensity != options.intensity:
        notes.append(f"intensity auto is {dataset.reading.intensity} here, and stored in the adapter")
    if dataset.reading.offset not in (NONE, options.offset):
        notes.append(f"{in_words(dataset.reading.offset)}; stored in the adapter")
    sided = labels_with_a_side(dataset.labels)
    if sided and options.augmentation != "none":
        notes.append(f"images are not flipped, because labels have a side: {', '.join(sided)}")
    return notes + warnings_of(surveys)


def check_output(output: Path, options: TrainOptions) -> None:
    """Raises a `UserError` if the folder contains another run, a run that cannot be resumed, or links."""
    for name in (CHECKPOINT, "overlays"):
        refuse_link(output / name)
    is_interrupted = (output / CHECKPOINT).exists()
    if is_interrupted and not options.resume:
        raise UserError(f"{output} holds an interrupted run; go on with --resume, or give another --output-dir.")
    if (output / RECORD_FILE).exists() and not is_interrupted and not options.overwrite:
        raise UserError(f"{output} holds a finished run; replace it with --overwrite, or give another --output-dir.")
    check_states(output / CHECKPOINT)


def score_best_adapter(
    accelerator: Accelerator, dataset: SegmentationDataset, options: TrainOptions
) -> list[MaskScore]:
    """Loads the best adapter from its folder, scores it on the test images, and draws some of them.

    This runs in full precision regardless of the training precision, so evaluate.py gives the same scores.
    """
    output = Path(options.output_dir)
    model, task = load_adapter(output / "adapter", options.backbone)
    model = model.to(accelerator.device)
    loader = accelerator.prepare(evaluation_loader(dataset, task.framing, options.batch_size, options.num_workers))
    scores = evaluate(accelerator, model, loader, task.labels, "test", distances=True)
    if accelerator.is_main_process:
        chosen = thinned(dataset, options.overlays)
        predictions = predict_masks(model, evaluation_loader(chosen, task.framing, 1))
        draw_overlays(predictions, task.labels, folder_in(output, "overlays"))
    return scores
