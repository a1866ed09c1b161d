"""The training loop, one for all methods."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from sam_medical.adapters.adapter import save_adapter
from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.common.files import replacing_folder, write_json
from sam_medical.common.signals import Interruption
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.loading import evaluation_loader, thinned, training_loader
from sam_medical.evaluation.metrics import CRITERIA, score_labels
from sam_medical.evaluation.prediction import evaluate
from sam_medical.methods import METHODS
from sam_medical.methods.method import Method
from sam_medical.methods.tuning import count_trainable, kept_tensors, parameter_groups
from sam_medical.models.backbones import checkpoint_blocks
from sam_medical.models.networks import has_batch_norm
from sam_medical.options.commands import TrainOptions
from sam_medical.training.losses import build_loss
from sam_medical.training.process import start_tracking
from sam_medical.training.progress import Progress
from sam_medical.training.run_state import Training
from sam_medical.training.run_states import GENERATIONS, Checkpoints, description_of_run, together

# For curves, overlays and metrics, in bytes.
ROOM_BESIDE = 16 * 2**20


def train(
    accelerator: Accelerator,
    tuned_model: nn.Module,
    text_embeddings: Tensor | None,
    splits: Mapping[str, SegmentationDataset],
    data: Mapping[str, Mapping[str, Any]],
    task: Task,
    options: TrainOptions,
    started: float,
) -> tuple[Progress, int]:
    """Trains to the last step, or to the first signal; keeps the adapter that was best on the validation images.

    A model in which nothing learns is validated and kept as it is.

    Returns:
        Where the run stands, and the number of the signal that stopped it, 0 if none did.

    Raises:
        UserError: if the run cannot be done or go on, its loss is no number, or the disk takes no more.
    """
    method = METHODS[task.method]
    if has_batch_norm(tuned_model):
        _check_batches(method, options, accelerator.num_processes)
    run = description_of_run(options, task, data, accelerator.num_processes)
    validation = Validation(accelerator, splits["validation"], text_embeddings, task, options)
    if method.learns:
        return _train_steps(accelerator, tuned_model, splits["train"], validation, run, options, started)
    progress = Progress(step=options.steps)
    validation.run(tuned_model.to(accelerator.device), progress)
    progress.seconds = time.monotonic() - started
    _write_history(accelerator, progress, Path(options.output_dir))
    return progress, 0


class Validation:
    """Scores the validation images, and keeps the adapter whenever it is the best so far."""

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: SegmentationDataset,
        text_embeddings: Tensor | None,
        task: Task,
        options: TrainOptions,
    ) -> None:
        images = thinned(dataset, options.validation_images)
        loader = evaluation_loader(images, task.framing, options.batch_size, options.num_workers)
        self._loader = accelerator.prepare(loader)
        self._accelerator = accelerator
        self._text_embeddings = text_embeddings
        self._task = task
        self._criterion = CRITERIA[options.choose_by]
        self._output = Path(options.output_dir)

    def run(self, model: nn.Module, progress: Progress) -> None:
        accelerator, labels = self._accelerator, self._task.labels
        masks = evaluate(accelerator, model, self._loader, labels, "validation")
        scores = score_labels(masks, labels, self._task.absent)
        dice = self._criterion(scores)
        of_labels = {f"validation Dice of {label}": score.dice for label, score in scores.items()}
        accelerator.log({"validation Dice": dice, **of_labels}, step=progress.step)
        is_best = progress.add_validation(dice, scores)
        if is_best:
            together(accelerator, self._output / "adapter", lambda: self._keep(model))

    def _keep(self, model: nn.Module) -> None:
        if self._accelerator.is_main_process:
            with replacing_folder(self._output / "adapter") as folder:
                save_adapter(self._accelerator.unwrap_model(model), self._text_embeddings, self._task, folder)


def _check_batches(method: Method, options: TrainOptions, processes: int) -> None:
    if options.batch_size < 2:
        raise UserError(f"{method.title} normalises over the batch: give a batch_size of at least 2.")
    if processes > 1:
        raise UserError(f"{method.title} keeps statistics of its batches, each process its own: train it in one.")


def _train_steps(
    accelerator: Accelerator,
    tuned_model: nn.Module,
    dataset: SegmentationDataset,
    validation: Validation,
    run: dict[str, Any],
    options: TrainOptions,
    started: float,
) -> tuple[Progress, int]:
    """Goes on where the output folder's newest state is, and leaves one after each validation and at a signal."""
    method, output = METHODS[options.method], Path(options.output_dir)
    model, optimizer, scheduler = _prepare(accelerator, tuned_model, options)
    training = Training(
        model=accelerator.unwrap_model(model),
        optimizer=cast(Any, optimizer).optimizer,
        scheduler=scheduler,
        scaler=accelerator.scaler,
        labels=list(dataset.labels),
    )
    if accelerator.is_main_process:
        _check_space(output, training.model)
    checkpoints = Checkpoints(accelerator, output, run, training)
    progress = checkpoints.resume(options.steps) or Progress()
    if progress.step:
        accelerator.print(f"Going on after step {progress.step} of {options.steps}.")
    started -= progress.seconds  # as if it had never been interrupted
    loader = _rest_of_images(accelerator, dataset, options, progress.step)
    start_tracking(accelerator, options)

    accelerator.print(
        f"{method.title}: training {count_trainable(tuned_model):,} values on {len(dataset)} images of "
        f"{options.dataset} for {', '.join(dataset.labels)}, on {accelerator.device}."
    )
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    loss_function = build_loss(method.loss, options.focal_weight)
    with Interruption() as interruption, bar:
        for loss in _losses(accelerator, model, optimizer, scheduler, loader, loss_function):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of step {progress.step + 1} is {loss}; give a lower learning_rate than "
                    f"{options.peak_learning_rate:g}, or mixed_precision no."
                )
            progress.add_step(loss)
            accelerator.log({"loss": loss, "rate": scheduler.get_last_lr()[-1]}, step=progress.step)
            bar.update()
            best = f"{progress.best_dice:.3f}" if progress.validations else "none yet"
            bar.set_postfix(loss=f"{loss:.3f}", best_dice=best)

            is_time_to_validate = progress.step % options.validate_every == 0 or progress.step == options.steps
            if is_time_to_validate:
                validation.run(model, progress)
            if interruption.number:
                accelerator.set_trigger()
            is_interrupted = accelerator.check_trigger()
            if is_time_to_validate or is_interrupted:
                progress.seconds = time.monotonic() - started
                checkpoints.save(progress)
                _write_history(accelerator, progress, output)
            if is_interrupted:
                return progress, max(gather_object([interruption.number]))
    return progress, 0


def _check_space(output: Path, model: nn.Module) -> None:
    """Raises a `UserError` if the disk has no room for the adapters and states that are there at a time."""
    adapter = sum(tensor.nbytes for tensor in kept_tensors(model).values())
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    needed = 2 * adapter + (GENERATIONS + 1) * (adapter + moments) + ROOM_BESIDE
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output} has {free / 2**20:.0f} MiB free, and the run needs {needed / 2**20:.0f} MiB; make room, or "
            "give another --output-dir."
        )


def _write_history(accelerator: Accelerator, progress: Progress, output: Path) -> None:
    def write() -> None:
        if accelerator.is_main_process:
            write_json(output / "history.json", progress.history)

    together(accelerator, output / "history.json", write)


def _prepare(
    accelerator: Accelerator, tuned_model: nn.Module, options: TrainOptions
) -> tuple[nn.Module, Optimizer, LRScheduler]:
    if options.gradient_checkpointing:
        checkpoint_blocks(tuned_model)
    if options.compile:
        tuned_model.compile()
    optimizer = AdamW(
        parameter_groups(tuned_model, options.weight_decay, options.peak_learning_rate, options.value_rate)
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    return *accelerator.prepare(tuned_model, optimizer), scheduler


def _rest_of_images(
    accelerator: Accelerator, dataset: SegmentationDataset, options: TrainOptions, step: int
) -> DataLoader:
    """The images of the steps that are left."""
    images_a_step = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    loader = training_loader(
        dataset,
        options.framing,
        options.batch_size,
        options.augmentation,
        options.seed,
        first=step * images_a_step,
        last=options.steps * images_a_step,
        num_workers=options.num_workers,
    )
    return accelerator.prepare(loader)


def _losses(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: Iterable[Mapping[str, Tensor]],
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[float]:
    """Takes the optimizer's steps one by one, and yields each one's loss, the mean over batches and processes."""
    losses = []
    for batch in loader:
        model.train()
        with accelerator.accumulate(model):
            loss = loss_function(model(batch["images"], batch["masks"]), batch["masks"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        if accelerator.sync_gradients:
            scheduler.step()
            yield sum(losses) / len(losses)
            losses.clear()
