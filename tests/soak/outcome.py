"""What a part of the soak has found, and how long it may go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """Counts of what came of each trial; a trial that failed is described in ``failures``.

    Attributes:
        title: What was tried.
        counts: How many trials ended how.
        failures: One line per trial that must not have ended as it did.
        remark: A figure that is no count.
    """

    title: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    remark: str = ""

    def add(self, ending: str) -> None:
        self.counts[ending] += 1

    def fail(self, description: str) -> None:
        self.counts["FAILED"] += 1
        self.failures.append(description)

    def line(self) -> str:
        parts = [f"{count} {ending}" for ending, count in self.counts.most_common()]
        return f"{self.title} {sum(self.counts.values())}: {', '.join(parts)}{self.remark and '; ' + self.remark}"


def until(seconds: float) -> Iterator[int]:
    """The numbers of trials, from 0, until the time is over; at least one."""
    end, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < end:
        yield number
        number += 1
