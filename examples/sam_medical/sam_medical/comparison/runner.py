"""Runs the unfinished runs of a comparison, each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import IO, cast

from tqdm import tqdm

from sam_medical.common.files import folder_in, refuse_link
from sam_medical.common.lock import command_in
from sam_medical.common.signals import PARENT, Stopped
from sam_medical.comparison.finished import FinishedRuns
from sam_medical.comparison.plan import Cell
from sam_medical.options.parsing import flags_of

TRAIN = [sys.executable, "-m", "sam_medical", "train"]
PACKAGE_PARENT = Path(__file__).parents[2]
LOG_FILE = "log.txt"
SECONDS_BETWEEN_LOOKS = 0.5


class Runner:
    """Runs the unfinished cells of a plan.

    Args:
        finished: The plan, its folder and its finished cells.

    Attributes:
        failures: The last output line of each failed cell.
    """

    def __init__(self, finished: FinishedRuns) -> None:
        self.finished = finished
        self.plan = finished.plan
        self.failures: dict[Cell, str] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = Event()

    def run(self) -> None:
        """Runs the learning-rate candidates first, and then all seeds at the best rates.

        Raises:
            Stopped: at a signal, after the processes were told to save their states.
        """
        self._run_all(self.plan.all_candidates)
        self._run_all(self.finished.chosen())

    def _run_all(self, cells: Iterable[Cell]) -> None:
        missing = [cell for cell in dict.fromkeys(cells) if not self.finished.is_done(cell)]
        bar = tqdm(total=len(missing), unit="run", disable=not missing)
        with bar, ThreadPoolExecutor(self.plan.options.jobs) as pool, self._ending_processes(pool):
            for cell, error in zip(missing, pool.map(self._run, missing), strict=True):
                if error is not None:
                    self.failures[cell] = error
                    bar.write(f"{cell.name} failed: {error}")
                bar.update()

    @contextmanager
    def _ending_processes(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """At a signal, cancels pending runs and lets the current ones save their state."""
        try:
            yield
        except Stopped as stop:
            self._stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)
            raise Stopped(stop.number, "Stopped; the same command goes on from here.") from stop

    def _run(self, cell: Cell) -> str | None:
        """Trains and evaluates one cell in its own process. Returns the error message; None if it succeeded."""
        folder = folder_in(self.finished.folder, *cell.name.split("/"))
        self._wait_for_other(cell)
        if self._stopping.is_set():
            return "stopped"
        if self.finished.is_done(cell):
            return None
        log_path = folder / LOG_FILE
        refuse_link(log_path)
        with log_path.open("w", encoding="utf-8") as log:
            # In a new session, Ctrl-C reaches the process only once, through this process. Its standard input is a
            # pipe without data: when this process ends, the pipe closes, and the run ends as well.
            process = subprocess.Popen(
                [*TRAIN, *self._flags(cell)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            self._processes.add(process)
            if self._stopping.is_set():  # it started after the other processes were told to stop
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self._processes.discard(process)
            cast(IO[bytes], process.stdin).close()
        return None if code == 0 else last_line(log_path.read_text(errors="replace")) or f"ended with status {code}"

    def _wait_for_other(self, cell: Cell) -> None:
        """Waits for a run in the cell's folder that a killed command has left behind."""
        folder = self.finished.folder_of(cell)
        holder = command_in(folder)
        if holder:
            tqdm.write(f"{cell.name} is in use by {holder}; waiting for it.", file=sys.stderr)
        while holder and not self._stopping.wait(SECONDS_BETWEEN_LOOKS):
            holder = command_in(folder)

    def _environment(self) -> dict[str, str]:
        # In a git checkout, the package may not be installed. Subprocesses then need its folder in PYTHONPATH.
        search_path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, PARENT: "1", "PYTHONPATH": search_path}
        jobs = self.plan.options.jobs
        if jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _flags(self, cell: Cell) -> list[str]:
        folder = self.finished.folder_of(cell)
        return flags_of({**self.plan.train_options(cell), "output_dir": str(folder), "resume": True})


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""
