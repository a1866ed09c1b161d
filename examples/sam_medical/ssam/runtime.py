"""How a process is set up before it computes."""

from __future__ import annotations

import torch
from transformers.utils import logging


def prepare_process() -> None:
    """Numbers too small for float32's full precision become zero, since CPUs compute with them many times slower; and
    transformers loads without progress bars between our own."""
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
