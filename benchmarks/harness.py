"""How things are timed here: warmed up, interleaved in one run, compared by the median of their ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender took, and how many times the reference of the same round."""

    seconds: list[float]
    ratios: list[float]

    def row(self, name: str) -> str:
        """A row of a Markdown table: name, median seconds, median ratio and its spread."""
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"| {name} | {statistics.median(self.seconds):.3f} | {statistics.median(self.ratios):.2f} "
            f"| {low:.2f} - {high:.2f} |"
        )


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]], reference: str, rounds: int = 11, warm_up: int = 2
) -> dict[str, Timing]:
    """Calls every contender once a round, so that a slow moment of the machine falls on all of them.

    Args:
        contenders: What to time, by name.
        reference: The contender that the others are compared with, round by round.
        rounds: How many rounds count.
        warm_up: How many rounds before them do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warm_up + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(times, [ours / theirs for ours, theirs in zip(times, seconds[reference], strict=True)])
        for name, times in seconds.items()
    }


def machine() -> str:
    """What this ran on, in a line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
