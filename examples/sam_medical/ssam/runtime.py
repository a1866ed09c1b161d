"""How a process is set up before it computes, and how several of them work together."""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import Accelerator
from transformers.utils import logging

from ssam.errors import UserError


def prepare_process() -> None:
    """Numbers too small for float32's full precision become zero, since CPUs compute with them many times slower; and
    transformers loads without progress bars between our own."""
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    # The name that accelerate and older versions of torch know; newer ones repeat at each start that it has another.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)


def check_processes(accelerator: Accelerator) -> None:
    """Makes sure that the processes a launcher started work on one run, and not each on one of its own.

    Raises:
        UserError: where they do not know of one another, as accelerate leaves them without a GPU.
    """
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
