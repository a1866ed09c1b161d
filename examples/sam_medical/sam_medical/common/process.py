"""Setup of a process, and checks of multi-process launches."""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers.utils import logging

from sam_medical.common.errors import UserError


def prepare_process() -> None:
    """Flushes denormal numbers to zero, which are very slow on CPUs, and silences libraries."""
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    # accelerate uses an argument name that newer versions of torch have deprecated.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    # MONAI's metrics use an argument that MONAI has deprecated.
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)


def check_processes(accelerator: Accelerator) -> None:
    """Checks that launched processes work on one run together, each with the whole model.

    Raises:
        UserError: if the processes are not connected, as accelerate leaves them without a GPU; or if they shard the
            model, as FSDP does, because such states cannot be saved here.
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
    """Waits for all processes before any of them ends. Otherwise some abort with open connections."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
