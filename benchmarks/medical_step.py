"""What a training step of S-SAM takes: with one label and with twelve, beside its data, and in memory.

    python benchmarks/medical_step.py --image-size 112
    python benchmarks/medical_step.py --backbone facebook/sam-vit-base \\
        --image-size 1024 --batch-size 1 --mixed-precision bf16

A step is a forward and a backward pass. Contenders take turns; seconds are medians, ratios medians of each round's
ratio. Memory is what a step allocates at its most beside the model; on the CPU, what autograd keeps for the backward
pass. Batches are read from --dataset as in training: the first time from its files, then from what is kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from sam_medical.adapters.building import build_model
from sam_medical.adapters.task import Task
from sam_medical.common.choices import Precision
from sam_medical.common.errors import one_line_errors
from sam_medical.common.process import prepare_process
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.loading import KEPT_BYTES, TrainingBatch, training_loader
from sam_medical.data.opening import open_dataset
from sam_medical.evaluation.report import markdown_table
from sam_medical.methods import METHODS
from sam_medical.models.backbone import checkpoint_blocks
from sam_medical.options.checks import check_values, require
from sam_medical.options.groups import option
from sam_medical.options.parsing import parse_options
from sam_medical.training.losses import build_loss

TEXT_WIDTH = 512
MIB = 2**20


@dataclass
class SpeedOptions:
    """Measure a training step of S-SAM, or of another method."""

    method: str = option("s-sam", "The method.")
    backbone: str = option("lite-medsam", "As for train.py.")
    image_size: int = option(112, "Side of the images, in pixels.")
    batch_size: int = option(2, "Images per step.")
    labels: int = option(12, "Labels that are compared with one.")
    mixed_precision: Precision = option("no", "Precision of the products.")
    dataset: str = option("brain-mri", "The dataset to read, as for train.py.")
    data_root: str | None = option(None, "Folder of its files.")
    num_workers: int = option(0, "Processes that read and augment images.")
    rounds: int = option(7, "Rounds that count.")

    def __post_init__(self) -> None:
        learning = [name for name, method in METHODS.items() if method.learns]
        require(self, "method", self.method in learning, f"must be one of {', '.join(learning)}")
        for name in ("image_size", "batch_size", "labels", "rounds"):
            require(self, name, getattr(self, name) >= 1, "must be at least 1")
        check_values(self)


@one_line_errors
def main() -> None:
    options = parse_options(SpeedOptions)
    prepare_process()
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    step_of = {
        "a step with 1 label": TrainingStep(accelerator, options, 1),
        f"a step with {options.labels} labels": TrainingStep(accelerator, options, options.labels),
        f"a step with {options.labels} labels, blocks checkpointed": TrainingStep(
            accelerator, options, options.labels, checkpointed=True
        ),
    }
    dataset = open_dataset(options.dataset, options.data_root, "train")
    from_files, from_memory = batches_of(dataset, options, keeping=False), batches_of(dataset, options, keeping=True)
    for _ in range(-(-len(dataset) // options.batch_size) + 1):
        next(from_memory)
    next(from_files)
    contenders: dict[str, Callable[[], object]] = {
        **step_of,
        "reading a batch from its files": lambda: next(from_files),
        "reading a batch that was kept": lambda: next(from_memory),
    }
    seconds = take_turns(contenders, options.rounds, accelerator.device)
    first = next(iter(contenders))
    rows = []
    for name, times in seconds.items():
        ratios = [mine / reference for mine, reference in zip(times, seconds[first], strict=True)]
        memory = f"{step_of[name].memory() / MIB:,.0f}" if name in step_of else ""
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        rows.append([name, f"{statistics.median(times):.3f}", f"{statistics.median(ratios):.2f}", spread, memory])
    print(f"{options}\n{accelerator.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(markdown_table(["", "seconds", "times the first", "least - most", "memory, MiB"], rows))


class TrainingStep:
    """Forward and backward pass of a method's model, on random images and masks."""

    def __init__(
        self, accelerator: Accelerator, options: SpeedOptions, labels: int, checkpointed: bool = False
    ) -> None:
        names = tuple(f"label {k}" for k in range(labels))
        task = Task("brain-mri", names, options.backbone, options.image_size, "", method=options.method)
        self.accelerator = accelerator
        self.model: nn.Module = build_model(task, torch.randn(labels, TEXT_WIDTH))[0].to(accelerator.device).train()
        if checkpointed:
            checkpoint_blocks(self.model)
        side, device = options.image_size, accelerator.device
        self.images = torch.rand(options.batch_size, 3, side, side, device=device)
        self.masks = (torch.rand(options.batch_size, labels, side, side, device=device) > 0.5).float()
        self.loss = build_loss(METHODS[options.method].loss, focal_weight=20.0)

    def __call__(self) -> None:
        with self.accelerator.autocast():
            logits = self.model(self.images, self.masks)
        self.loss(logits, self.masks).backward()

    def memory(self) -> int:
        """Bytes that a step takes."""
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.images.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), self.accelerator.autocast():
            self.model(self.images, self.masks)
        own = {tensor.untyped_storage().data_ptr() for tensor in self._tensors_of_the_model()}
        return sum(size for pointer, size in kept.items() if pointer not in own)

    def _tensors_of_the_model(self) -> Iterator[torch.Tensor]:
        """Parameters, buffers, and what else hangs on a module, as U and Vᵀ do."""
        for module in self.model.modules():
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()):
                if isinstance(value, torch.Tensor):
                    yield value


def batches_of(dataset: SegmentationDataset, options: SpeedOptions, keeping: bool) -> Iterator[TrainingBatch]:
    """Augmented training batches, as a run reads them, without end; each image from its file if none is kept."""
    last = options.batch_size * 10_000
    yield from training_loader(
        dataset,
        options.image_size,
        options.batch_size,
        "upright",
        seed=0,
        first=0,
        last=last,
        num_workers=options.num_workers,
        kept_bytes=KEPT_BYTES if keeping else 0,
    )


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            contender()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
