"""The training loop, one for all methods."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ssam.adapter import Task, save_adapter
from ssam.backbones import checkpoint_blocks
from ssam.checkpoint import (
    Interruption,
    Progress,
    check_same_run,
    description_of_run,
    save_adapter_only,
    save_state,
)
from ssam.data import SegmentationDataset
from ssam.data.loading import evaluation_loader, training_loader
from ssam.errors import UserError
from ssam.evaluation import evaluate
from ssam.files import replacing_folder
from ssam.losses import build_loss
from ssam.methods import METHODS
from ssam.metrics import mean_dice, score_labels
from ssam.networks import has_batch_norm
from ssam.options import TrainOptions
from ssam.runtime import start_tracking
from ssam.tuning import count_trainable, parameter_groups


def train(
    accelerator: Accelerator,
    tuned_model: nn.Module,
    text_embeddings: Tensor | None,
    splits: Mapping[str, SegmentationDataset],
    task: Task,
    options: TrainOptions,
    started: float,
) -> Progress:
    """Trains to the last step, or to the first Ctrl-C; keeps the adapter that was best on the validation images.

    A model in which nothing learns is validated and kept as it is.
    """
    output = Path(options.output_dir)
    method = METHODS[task.method]
    if has_batch_norm(tuned_model) and options.batch_size < 2:
        raise UserError(f"{method.title} normalises over the batch: give a batch_size of at least 2.")
    if has_batch_norm(tuned_model) and accelerator.num_processes > 1:
        raise UserError(f"{method.title} keeps statistics of its batches, each process its own: train it in one.")
    validation_loader = evaluation_loader(
        splits["validation"], options.image_size, options.batch_size, options.num_workers
    )
    progress = Progress()

    def validate(model: nn.Module) -> None:
        """Scores the validation images, and keeps the adapter if it is the best so far."""
        scores = evaluate(accelerator, model, validation_loader, task.labels, "validation")
        dice = mean_dice(score_labels(scores, task.labels))
        accelerator.log({"validation Dice": dice}, step=progress.step)
        if progress.add_validation(dice) and accelerator.is_main_process:
            with replacing_folder(output / "adapter") as folder:
                save_adapter(accelerator.unwrap_model(model), text_embeddings, task, folder)

    if not method.learns:
        validation_loader = accelerator.prepare(validation_loader)
        progress.step = options.steps
        validate(tuned_model.to(accelerator.device))
        progress.seconds = time.monotonic() - started
        return progress

    if options.gradient_checkpointing:
        checkpoint_blocks(tuned_model)
    if options.compile:
        tuned_model.compile()
    optimizer = AdamW(
        parameter_groups(tuned_model, options.weight_decay, options.peak_learning_rate, options.value_rate)
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    loss_function = build_loss(method.loss, options.focal_weight)
    model, optimizer, validation_loader = accelerator.prepare(tuned_model, optimizer, validation_loader)

    accelerator.register_for_checkpointing(progress, scheduler)
    save_adapter_only(accelerator)
    run = description_of_run(options, task, accelerator.num_processes)
    if (output / "checkpoint").exists():
        check_same_run(output / "checkpoint", run)
        accelerator.load_state(str(output / "checkpoint"))
        accelerator.print(f"Going on after step {progress.step} of {options.steps}.")
    images_a_step = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    seconds_before = progress.seconds
    train_loader = accelerator.prepare(
        training_loader(
            splits["train"],
            options.image_size,
            options.batch_size,
            options.augmentation,
            options.seed,
            first=progress.step * images_a_step,
            last=options.steps * images_a_step,
            num_workers=options.num_workers,
        )
    )
    start_tracking(accelerator, options)

    accelerator.print(
        f"{method.title}: training {count_trainable(tuned_model):,} values on {len(splits['train'])} images of "
        f"{options.dataset} for {', '.join(task.labels)}, on {accelerator.device}."
    )
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    with Interruption() as interruption, bar:
        losses_of_step = []
        for batch in train_loader:
            model.train()
            with accelerator.accumulate(model):
                loss = loss_function(model(batch["images"], batch["masks"]), batch["masks"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses_of_step.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            if not accelerator.sync_gradients:
                continue

            scheduler.step()
            progress.add_step(sum(losses_of_step) / len(losses_of_step))
            losses_of_step.clear()
            accelerator.log({"loss": progress.losses[-1], "rate": scheduler.get_last_lr()[-1]}, step=progress.step)
            bar.update()
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", best_dice=f"{progress.best_dice:.3f}")

            is_time_to_validate = progress.step % options.validate_every == 0 or progress.step == options.steps
            if is_time_to_validate:
                validate(model)
            if interruption.requested:
                accelerator.set_trigger()
            is_interrupted = accelerator.check_trigger()
            if is_time_to_validate or is_interrupted:
                progress.seconds = seconds_before + time.monotonic() - started
                save_state(accelerator, output / "checkpoint", run)
            if is_interrupted:
                break
    return progress
