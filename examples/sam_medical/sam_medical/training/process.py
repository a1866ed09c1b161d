"""Setting up a process before it computes, and letting several work together."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from transformers.utils import logging

from sam_medical.common.errors import UserError
from sam_medical.options.commands import TrainOptions


def prepare_process() -> None:
    """Sets what holds for a whole process.

    Numbers too small for float32's full precision become zero, because CPUs are many times slower with them.
    transformers shows no progress bars of its own, and known warnings are silenced.
    """
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    # accelerate and older versions of torch know the argument by this name. Newer versions warn at each start.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    # MONAI's metrics pass an argument that MONAI itself has deprecated.
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)


def make_accelerator(options: TrainOptions) -> Accelerator:
    available = [str(tracker) for tracker in get_available_trackers()]
    if options.report_to is not None and options.report_to not in available:
        raise UserError(
            f"report_to {options.report_to!r} is no tracker that accelerate finds here; install its package, or give "
            f"one of {', '.join(available) or 'none: no tracker is installed'}."
        )
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.output_dir,
            # The only buffers are constants, the same in every process.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"mixed_precision {options.mixed_precision!r} cannot be had here: {error}") from error


def start_tracking(accelerator: Accelerator, options: TrainOptions) -> None:
    """Tells the tracker, if there is one, what is run."""
    if options.report_to is not None:
        plain = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in asdict(options).items()
        }
        accelerator.init_trackers("ssam", config=plain)


def check_processes(accelerator: Accelerator) -> None:
    """Makes sure that the processes a launcher started work on one run, each with the whole model.

    Raises:
        UserError: where they do not know of one another, as accelerate leaves them without a GPU, or share the model
            out between them, as with FSDP, whose states cannot be saved here.
    """
    kind = accelerator.distributed_type
    if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise UserError(
            f"the launcher uses {kind.value}, with which a run's state cannot be saved here; launch with --multi_gpu."
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were launched, and accelerate finds no GPUs on which they can work together; for "
            "processes on the CPU set ACCELERATE_USE_CPU=true in the environment."
        )


def end_together(accelerator: Accelerator) -> None:
    """Lets every process end, once all have come here; otherwise some abort with their connections still open."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
