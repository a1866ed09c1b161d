"""Setting up a process before it computes, and letting several work together."""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers.utils import logging

from sam_medical.common.errors import UserError


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
