"""The example's training, killed at random moments and resumed until it is done: the same bits as without a kill."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from sam_medical.adapters.task import read_task
from soak.example_run import make_options, result_of, run_in_a_child, same
from soak.outcome import Outcome, until

# Kills of one run before it is left to end.
MOST_KILLS = 4


def run(seconds: float, seed: int) -> Outcome:
    outcome, randomness = Outcome("kills"), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        options = make_options(root)
        started = time.monotonic()
        code = run_in_a_child(options, root / "whole", None)
        duration = time.monotonic() - started
        if code != 0:
            outcome.fail(f"the run without a kill ended with {code}: {(root / 'whole.log').read_text()[-300:]}")
            return outcome
        for number in until(seconds):
            folder = root / f"run{number}"
            moments = [randomness.uniform(0.05, 1.0) * duration for _ in range(randomness.randint(1, MOST_KILLS))]
            _kill_and_resume(options, folder, moments, result_of(root / "whole"), outcome)
            shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _kill_and_resume(
    options: dict[str, Any], folder: Path, moments: list[float], whole: Any, outcome: Outcome
) -> None:
    kills, had_adapter = 0, False
    for moment in moments:
        if run_in_a_child(options, folder, moment) != -signal.SIGKILL:
            break  # it was done before
        kills += 1
        had_adapter = had_adapter or (folder / "adapter").exists()
        if had_adapter:
            try:
                read_task(folder / "adapter")
            except Exception as error:
                outcome.fail(f"{folder.name}: the best adapter is gone: {error}")
    was_done = (folder / "metrics.json").exists()
    code = 0 if was_done else run_in_a_child(options, folder, None)
    if code != 0:
        log = folder.with_name(f"{folder.name}.log").read_text()[-300:]
        outcome.fail(f"{folder.name} ended with {code}: {log}")
    elif not same(result_of(folder), whole):
        outcome.fail(f"{folder.name} came out otherwise than the run without a kill")
    else:
        outcome.counts["resumed to the same bits"] += kills
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if left and not was_done:
        outcome.fail(f"{folder.name} holds {', '.join(left)}")
