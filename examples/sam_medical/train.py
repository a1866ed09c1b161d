"""Train S-SAM: one small adapter that lets SAM segment what a label's name says.

The demo, on a brain MRI that needs no download:

    python examples/sam_medical/train.py --config examples/sam_medical/configs/demo.yaml --output-dir runs/demo

GlaS, on a GPU in bfloat16, from SAM's ViT-B and CLIP:

    accelerate launch examples/sam_medical/train.py --config examples/sam_medical/configs/glas.yaml \\
        --data-root /data/glas --backbone facebook/sam-vit-base --text-encoder openai/clip-vit-base-patch32 \\
        --image-size 256 --mixed-precision bf16 --output-dir runs/glas

The run leaves in the output directory: adapter/ (the best by validation Dice), metrics.json, curves.png, overlays/.
After Ctrl-C it can go on: repeat the command with --resume.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ssam.adapter import Task, build_model, load_adapter, save_adapter
from ssam.checkpoint import (
    Interruption,
    Progress,
    check_same_run,
    description_of_run,
    save_adapter_only,
    save_state,
)
from ssam.data import SegmentationDataset, open_dataset
from ssam.data.loading import evaluation_loader, spread, training_loader
from ssam.errors import UserError, one_line_errors
from ssam.evaluation import evaluate, predict_masks
from ssam.files import replacing_folder, write_json
from ssam.losses import FocalDiceLoss
from ssam.methods import parameter_groups, ssam_config
from ssam.metrics import LabelScores, mean_dice, score_labels
from ssam.model import TextPromptedSam
from ssam.options import TrainOptions, parse_options
from ssam.report import draw_curves, draw_overlays, format_table, scores_as_json
from ssam.runtime import check_processes, end_together, prepare_process
from ssam.text import encode_labels


@one_line_errors
def main() -> None:
    started = time.monotonic()
    options = parse_options(TrainOptions)
    output = Path(options.output_dir)
    if (output / "checkpoint").exists() and not options.resume:
        raise UserError(f"{output} holds an interrupted run; go on with --resume, or give another --output-dir.")
    if (output / "metrics.json").exists() and not (output / "checkpoint").exists() and not options.overwrite:
        raise UserError(f"{output} holds a finished run; replace it with --overwrite, or give another --output-dir.")
    prepare_process()
    accelerator = make_accelerator(options)
    check_processes(accelerator)
    set_seed(options.seed)

    splits = {
        split: open_dataset(options.dataset, options.data_root, split, options.labels)
        for split in ("train", "validation", "test")
    }
    check_images(splits)

    task = Task(
        dataset=options.dataset,
        labels=tuple(splits["train"].labels),
        backbone=options.backbone,
        image_size=options.image_size,
        text_encoder=options.text_encoder,
    )
    text_embeddings = encode_labels(task.text_encoder, task.labels)
    model, backbone, task = build_model(task, text_embeddings.shape[1])
    peft_model = tune(model, options.target_modules or backbone.target_modules)

    progress = train(accelerator, peft_model, text_embeddings, splits, task, options, started)
    if progress.step < options.steps:
        accelerator.print(f"Stopped after step {progress.step}; repeat the command with --resume to go on.")
        end_together(accelerator)
        sys.exit(130)

    scores = score_best_adapter(accelerator, splits["test"], options)
    if accelerator.is_main_process:
        metrics = {
            "test": scores_as_json(scores),
            "validation": {"best_dice": progress.best_dice, "best_step": progress.best_step},
            "trainable_parameters": count_trainable(peft_model),
            "seconds": round(progress.seconds, 1),
            "options": asdict(options),
        }
        write_json(output / "metrics.json", metrics)
        draw_curves(progress.losses, progress.validations, output / "curves.png")
        shutil.rmtree(output / "checkpoint")
        print(format_table(scores))
        for name in ("adapter", "metrics.json", "curves.png", "overlays"):
            print(f"{name:<12} {output / name}")
    end_together(accelerator)


def make_accelerator(options: TrainOptions) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            # The only buffers are constants, the same in every process.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"mixed_precision {options.mixed_precision!r} cannot be had here: {error}") from error


def check_images(splits: Mapping[str, SegmentationDataset]) -> None:
    """Reads every image and mask once, so that a bad file is found before training starts."""
    bar = tqdm(desc="checking the images", total=sum(map(len, splits.values())), unit="image", leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for dataset in splits.values():
            for _ in pool.map(lambda index, dataset=dataset: dataset[index].name, range(len(dataset))):
                bar.update()


def tune(model: TextPromptedSam, target_modules: str) -> PeftModel:
    """Says to PEFT what is trained; everything else stays frozen."""
    names = [name for name, _ in model.named_modules()]
    try:
        if not any(re.fullmatch(target_modules, name) for name in names):
            example = next(name for name in names if name.endswith("qkv"))
            raise ValueError(f"matches no layer; their names are like {example}")
        return get_peft_model(model, ssam_config(model, target_modules))
    except (ValueError, TypeError, re.error) as error:
        raise UserError(f"target_modules {target_modules!r}: {error}") from error


def train(
    accelerator: Accelerator,
    peft_model: PeftModel,
    text_embeddings: Tensor,
    splits: Mapping[str, SegmentationDataset],
    task: Task,
    options: TrainOptions,
    started: float,
) -> Progress:
    """Trains to the last step, or to the first Ctrl-C; keeps the adapter that was best on the validation images."""
    output = Path(options.output_dir)
    optimizer = AdamW(parameter_groups(peft_model, options.weight_decay), lr=options.learning_rate)
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    loss_function = FocalDiceLoss(options.focal_weight)
    validation_loader = evaluation_loader(
        splits["validation"], options.image_size, options.batch_size, options.num_workers
    )
    model, optimizer, validation_loader = accelerator.prepare(peft_model, optimizer, validation_loader)
    text_embeddings = text_embeddings.to(accelerator.device)

    progress = Progress()
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

    accelerator.print(
        f"Training {count_trainable(peft_model):,} values on {len(splits['train'])} images of {options.dataset} "
        f"for {', '.join(task.labels)}, on {accelerator.device}."
    )
    bar = tqdm(total=options.steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    with Interruption() as interruption, bar:
        losses_of_step = []
        for batch in train_loader:
            model.train()
            with accelerator.accumulate(model):
                loss = loss_function(model(batch["images"], text_embeddings), batch["masks"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses_of_step.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            if not accelerator.sync_gradients:
                continue

            scheduler.step()
            progress.add_step(sum(losses_of_step) / len(losses_of_step))
            losses_of_step.clear()
            bar.update()
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", best_dice=f"{progress.best_dice:.3f}")

            is_time_to_validate = progress.step % options.validate_every == 0 or progress.step == options.steps
            if is_time_to_validate:
                counts = evaluate(accelerator, model, validation_loader, text_embeddings, task.labels, "validation")
                is_best = progress.add_validation(mean_dice(score_labels(counts, task.labels)))
                if is_best and accelerator.is_main_process:
                    with replacing_folder(output / "adapter") as folder:
                        save_adapter(accelerator.unwrap_model(model), text_embeddings, task, folder)
            if interruption.requested:
                accelerator.set_trigger()
            is_interrupted = accelerator.check_trigger()
            if is_time_to_validate or is_interrupted:
                progress.seconds = seconds_before + time.monotonic() - started
                save_state(accelerator, output / "checkpoint", run)
            if is_interrupted:
                break
    return progress


def score_best_adapter(
    accelerator: Accelerator, dataset: SegmentationDataset, options: TrainOptions
) -> dict[str, LabelScores]:
    """Reads the best adapter back from its folder, scores it on the test images, and draws some of them.

    In full precision, whatever it was trained in, so that evaluate.py finds the same.
    """
    output = Path(options.output_dir)
    model, text_embeddings, task = load_adapter(output / "adapter")
    model, text_embeddings = model.to(accelerator.device), text_embeddings.to(accelerator.device)
    loader = accelerator.prepare(
        evaluation_loader(dataset, options.image_size, options.batch_size, options.num_workers)
    )
    counts = evaluate(accelerator, model, loader, text_embeddings, task.labels, "test")
    if accelerator.is_main_process:
        chosen = spread(dataset, options.overlays)
        predictions = predict_masks(model, evaluation_loader(chosen, options.image_size, 1), text_embeddings)
        draw_overlays(predictions, task.labels, output / "overlays")
    return score_labels(counts, task.labels)


def count_trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
