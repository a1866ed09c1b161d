"""Creates the accelerator and its tracker from the options."""

from __future__ import annotations

from dataclasses import asdict

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from sam_medical.common.errors import UserError
from sam_medical.options.commands import TrainOptions


def make_accelerator(options: TrainOptions) -> Accelerator:
    """Returns the accelerator of a run. Raises a `UserError` if the tracker or the precision is not available."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if options.report_to is not None and options.report_to not in available:
        raise UserError(
            f"report_to {options.report_to!r} is not a tracker that accelerate finds here; install it, or give "
            f"one of {', '.join(available) or 'none: no tracker is installed'}."
        )
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_dir=options.output_dir,
            # All buffers are constants, so broadcasting them is unnecessary.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"mixed_precision {options.mixed_precision!r} is not available here: {error}") from error


def start_tracking(accelerator: Accelerator, options: TrainOptions) -> None:
    """Starts the tracker, if the options name one, and logs the options."""
    if options.report_to is not None:
        plain = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in asdict(options).items()
        }
        accelerator.init_trackers("ssam", config=plain)
