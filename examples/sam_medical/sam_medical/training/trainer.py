"""The training loop of all methods."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from sam_medical.adapters.adapter import save_adapter
from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.common.files import replacing_folder, write_json
from sam_medical.common.signals import Interruption
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.loading import TrainingBatch, evaluation_loader, thinned, training_loader
from sam_medical.evaluation.metrics import CRITERIA, score_labels
from sam_medical.evaluation.prediction import evaluate
from sam_medical.methods import METHODS
from sam_medical.methods.tuning import count_trainable, parameter_groups
from sam_medical.models.backbone import checkpoint_blocks
from sam_medical.models.networks import has_batch_norm
from sam_medical.options.commands import TrainOptions
from sam_medical.training.accelerator import start_tracking
from sam_medical.training.losses import build_loss
from sam_medical.training.progress import Progress
from sam_medical.training.run_state import Training
from sam_medical.training.run_states import GENERATIONS, Checkpoints, description_of_run, together

HISTORY_FILE = "history.json"
# Disk space for curves, overlays and metrics, in bytes.
ROOM_BESIDE = 16 * 2**20


@dataclass(frozen=True)
class Run:
    """The inputs of a training run.

    Attributes:
        options: The options of the run.
        task: The task of the adapter.
        splits: The images: train, validation and test.
        data: Per split, the number of images and their digest, from `check_images`.
        text_embeddings: The text embeddings of the labels, (K, D); None if the model is not prompted by text.
        accelerator: The processes and devices.
        started: Start of the run, from `time.monotonic`.
    """

    options: TrainOptions
    task: Task
    splits: Mapping[str, SegmentationDataset]
    data: Mapping[str, Mapping[str, Any]]
    text_embeddings: Tensor | None
    accelerator: Accelerator
    started: float

    @property
    def output(self) -> Path:
        return Path(self.options.output_dir)


class Trainer:
    """Trains a model until the last step or the first signal, and saves the adapter with the best validation score.

    Args:
        run: The inputs of the run.
        model: The model with the run's method applied.

    Attributes:
        progress: The progress of the run.

    Raises:
        UserError: if the options do not suit the model, or the disk is too full.
    """

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run = run
        self.options, self.accelerator, self.output = run.options, run.accelerator, run.output
        self.method = METHODS[run.task.method]
        self.tuned_model = model
        if has_batch_norm(model):
            self._check_batches()
        self._validation_images = self._load_validation_images()
        self._started = run.started
        self.progress = Progress()
        if self.method.learns:
            self._prepare_to_learn()
        else:
            self.model = model.to(self.accelerator.device)

    def fit(self) -> int:
        """Trains from the last saved state, if there is one.

        A model without trained parameters is only validated and saved.

        Returns:
            The number of the signal that stopped the run; 0 if none did.

        Raises:
            UserError: if the loss is NaN or infinite, or a file cannot be written.
        """
        if not self.method.learns:
            self._keep_as_it_is()
            return 0
        self.resume()
        images = self._remaining_images()
        start_tracking(self.accelerator, self.options)
        self._announce()
        with Interruption() as interruption, self._progress_bar() as bar:
            for batch in images:
                loss = self.step(batch)
                if loss is None:  # more batches belong to this update
                    continue
                self._note(loss, bar)
                is_validated = self._is_time_to_validate()
                if is_validated:
                    self.validate()
                is_interrupted = self._is_interrupted(interruption)
                if is_validated or is_interrupted:
                    self.save()
                if is_interrupted:
                    return max(gather_object([interruption.number]))
        return 0

    def step(self, batch: TrainingBatch) -> float | None:
        """Runs the forward and backward pass of one batch.

        Returns:
            None until `gradient_accumulation_steps` batches are complete. Then the loss of the update: the mean over
            batches and processes.
        """
        accelerator = self.accelerator
        self.model.train()
        with accelerator.accumulate(self.model):
            loss = self._loss_function(self.model(batch["images"], batch["masks"]), batch["masks"])
            accelerator.backward(loss)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        if not accelerator.sync_gradients:
            return None
        self._scheduler.step()
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        return mean

    def validate(self) -> None:
        """Scores the validation images, and saves the adapter if it is the best so far."""
        accelerator, labels = self.accelerator, self.run.task.labels
        scores = evaluate(accelerator, self.model, self._validation_images, labels, "validation")
        by_label = score_labels(scores, labels, self.run.task.absent)
        dice = CRITERIA[self.options.choose_by](by_label)
        label_dice = {f"validation Dice of {label}": score.dice for label, score in by_label.items()}
        accelerator.log({"validation Dice": dice, **label_dice}, step=self.progress.step)
        is_best = self.progress.add_validation(dice, by_label)
        if is_best:
            together(accelerator, self.output / "adapter", self._save_adapter)

    def save(self) -> None:
        """Saves the run's state, from which it can be resumed, and its history."""
        self.progress.seconds = time.monotonic() - self._started
        self._checkpoints.save(self.progress)
        self._write_history()

    def resume(self) -> None:
        """Restores the newest state in the output folder, if there is one."""
        self.progress = self._checkpoints.resume(self.options.steps) or Progress()
        if self.progress.step:
            self.accelerator.print(f"Going on after step {self.progress.step} of {self.options.steps}.")
        self._started -= self.progress.seconds  # as if the run had never been interrupted

    def _check_batches(self) -> None:
        """Raises a `UserError` if batches are too small or distributed, which batch normalisation does not allow."""
        title = self.method.title
        if self.options.batch_size < 2:
            raise UserError(f"{title} uses batch norm; give a batch_size of at least 2.")
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"{title} uses batch norm, whose statistics differ between processes; train it in one process."
            )

    def _load_validation_images(self) -> DataLoader:
        options = self.options
        images = thinned(self.run.splits["validation"], options.validation_images)
        loader = evaluation_loader(images, self.run.task.framing, options.batch_size, options.num_workers)
        return self.accelerator.prepare(loader)

    def _prepare_to_learn(self) -> None:
        """Creates the optimizer, scheduler, loss and checkpoints."""
        options, accelerator, run = self.options, self.accelerator, self.run
        if options.gradient_checkpointing:
            checkpoint_blocks(self.tuned_model)
        if options.compile:
            self.tuned_model.compile()
        optimizer = AdamW(
            parameter_groups(self.tuned_model, options.weight_decay, options.peak_learning_rate, options.value_rate)
        )
        self._scheduler = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
        self.model, self._optimizer = accelerator.prepare(self.tuned_model, optimizer)
        self._loss_function = build_loss(self.method.loss, options.focal_weight)
        self._losses: list[float] = []  # of the batches of one update
        training = Training(
            model=accelerator.unwrap_model(self.model),
            tuner=self.method.tuner,
            optimizer=cast(Any, self._optimizer).optimizer,
            scheduler=self._scheduler,
            scaler=accelerator.scaler,
            labels=list(run.splits["train"].labels),
        )
        if accelerator.is_main_process:
            self._check_space(training.model)
        description = description_of_run(options, run.task, run.data, accelerator.num_processes)
        self._checkpoints = Checkpoints(accelerator, self.output, description, training)

    def _check_space(self, model: nn.Module) -> None:
        """Raises a `UserError` if the disk has no space for the adapters and states that exist at the same time."""
        adapter = sum(tensor.nbytes for tensor in self.method.tuner.state(model).values())
        moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        needed = 2 * adapter + (GENERATIONS + 1) * (adapter + moments) + ROOM_BESIDE
        free = shutil.disk_usage(self.output).free
        if free < needed:
            raise UserError(
                f"{self.output} has {free / 2**20:.0f} MiB free, and the run needs {needed / 2**20:.0f} MiB; make "
                "room, or give another --output-dir."
            )

    def _remaining_images(self) -> DataLoader:
        """Returns the loader of the remaining steps."""
        options = self.options
        images_per_step = options.batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        loader = training_loader(
            self.run.splits["train"],
            options.framing,
            options.batch_size,
            options.augmentation,
            options.seed,
            first=self.progress.step * images_per_step,
            last=options.steps * images_per_step,
            num_workers=options.num_workers,
        )
        return self.accelerator.prepare(loader)

    def _announce(self) -> None:
        images = self.run.splits["train"]
        self.accelerator.print(
            f"{self.method.title}: training {count_trainable(self.tuned_model):,} values on {len(images)} images of "
            f"{self.options.dataset} for {', '.join(images.labels)}, on {self.accelerator.device}."
        )

    def _progress_bar(self) -> tqdm:
        is_silent = not self.accelerator.is_main_process
        return tqdm(total=self.options.steps, initial=self.progress.step, unit="step", disable=is_silent)

    def _note(self, loss: float, bar: tqdm) -> None:
        """Counts a step and logs it to tracker and terminal. Raises a `UserError` if the loss is not finite."""
        progress = self.progress
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {progress.step + 1} is {loss}; give a lower learning_rate than "
                f"{self.options.peak_learning_rate:g}, or mixed_precision no."
            )
        progress.add_step(loss)
        self.accelerator.log({"loss": loss, "rate": self._scheduler.get_last_lr()[-1]}, step=progress.step)
        bar.update()
        best = f"{progress.best_dice:.3f}" if progress.validations else "none yet"
        bar.set_postfix(loss=f"{loss:.3f}", best_dice=best)

    def _is_time_to_validate(self) -> bool:
        return self.progress.step % self.options.validate_every == 0 or self.progress.step == self.options.steps

    def _is_interrupted(self, interruption: Interruption) -> bool:
        """Whether any of the processes has received a signal."""
        if interruption.number:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _keep_as_it_is(self) -> None:
        self.progress.step = self.options.steps
        self.validate()
        self.progress.seconds = time.monotonic() - self._started
        self._write_history()

    def _save_adapter(self) -> None:
        if self.accelerator.is_main_process:
            with replacing_folder(self.output / "adapter") as folder:
                model = self.accelerator.unwrap_model(self.model)
                save_adapter(model, self.run.text_embeddings, self.run.task, folder)

    def _write_history(self) -> None:
        def write() -> None:
            if self.accelerator.is_main_process:
                write_json(self.output / HISTORY_FILE, self.progress.history)

        together(self.accelerator, self.output / HISTORY_FILE, write)
