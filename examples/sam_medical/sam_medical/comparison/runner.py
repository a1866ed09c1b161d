"""The runs of a comparison: which there are, which are done, and the others one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from threading import Event
from typing import IO, Any, cast

from tqdm import tqdm

from sam_medical.common.errors import UserError
from sam_medical.common.files import folder_in, refuse_link
from sam_medical.common.lock import command_in
from sam_medical.common.signals import PARENT, Stopped
from sam_medical.common.values import is_number
from sam_medical.comparison.plan import Cell, Plan
from sam_medical.comparison.portable import portable_options, portable_text
from sam_medical.comparison.results import Results, RunResult, result_of
from sam_medical.data.opening import open_splits
from sam_medical.evaluation.metrics import read_scores
from sam_medical.options.commands import CompareOptions, TrainOptions
from sam_medical.options.parsing import flags_of
from sam_medical.training.run_state import read_json
from sam_medical.training.run_states import FREE_OPTIONS

TRAIN = [sys.executable, "-m", "sam_medical", "train"]
PACKAGE_PARENT = Path(__file__).parents[2]
METRICS_FILE = "metrics.json"
LOG_FILE = "log.txt"
SCORES_FILE = "scores.csv"
SECONDS_BETWEEN_LOOKS = 0.5
# What may differ from run to run in one comparison.
OPTIONS_OF_A_RUN = {"method", "seed", "learning_rate", *FREE_OPTIONS}


class Bench:
    """All cells of a comparison, in one folder.

    Attributes:
        options: What to compare.
        plan: Which cells there are.
        failures: What a failed cell said last.

    Raises:
        UserError: if a fold cannot be read, or a finished run in the folder was made of other things.
    """

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.plan = Plan(options)
        self.folder = Path(options.output_dir)
        self.failures: dict[Cell, str] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = Event()
        for fold in self.plan.folds:
            open_splits(self.plan.dataset_of(fold), options.data_root, options.labels, options.reading)
        self._check_finished_runs()

    def run(self) -> None:
        """Runs every cell that is not done, first those by which the learning rates are chosen."""
        candidates = self._candidates()
        self._run_all(candidates)
        self._run_all(self._chosen(candidates))
        self._check_finished_runs()

    def results(self) -> Results:
        """What the finished runs have given, read from their folders."""
        candidates = self._candidates()
        cells = sorted(cell for cell in {*candidates, *self._chosen(candidates)} if self.is_done(cell))
        written = {cell: self.metrics(cell) for cell in cells}
        # `_check_finished_runs` has seen that those that say it agree.
        images = {cell.fold: metrics["data"] for cell, metrics in written.items() if metrics["data"]}
        weights = [metrics["weights"] for metrics in written.values() if metrics["weights"]]
        runs = {cell: self._result(cell, metrics) for cell, metrics in written.items()}
        return Results(
            options=portable_options(self.options),
            labels=list(written[cells[0]]["test"]["labels"]) if cells else [],
            images=images,
            weights=weights[0] if weights else "",
            runs=runs,
            failures={cell.name: portable_text(text, self.options) for cell, text in self.failures.items()},
        )

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def is_done(self, cell: Cell) -> bool:
        return (self.folder_of(cell) / METRICS_FILE).is_file()

    def metrics(self, cell: Cell) -> dict[str, Any]:
        return read_metrics(self.folder_of(cell) / METRICS_FILE)

    def _result(self, cell: Cell, metrics: dict[str, Any]) -> RunResult:
        folder = self.folder_of(cell)
        scores = read_scores(folder / SCORES_FILE)
        try:
            return result_of(metrics, scores)
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_run(folder / METRICS_FILE) from error

    def _candidates(self) -> list[Cell]:
        return [cell for pair in self.plan.pairs for cell in self.plan.candidates(*pair)]

    def _chosen(self, candidates: Iterable[Cell]) -> list[Cell]:
        """All seeds at the learning rates that validation has chosen among the finished candidates."""
        done = [cell for cell in candidates if self.is_done(cell)]
        rates = self.plan.best_rates({cell: self.metrics(cell)["validation"]["best_dice"] for cell in done})
        return self.plan.with_all_seeds(rates)

    def _run_all(self, cells: Iterable[Cell]) -> None:
        missing = [cell for cell in dict.fromkeys(cells) if not self.is_done(cell)]
        bar = tqdm(total=len(missing), unit="run", disable=not missing)
        with bar, ThreadPoolExecutor(self.options.jobs) as pool, self._ending_runs(pool):
            for cell, error in zip(missing, pool.map(self._run, missing), strict=True):
                if error is not None:
                    self.failures[cell] = error
                    bar.write(f"{cell.name} has failed: {error}")
                bar.update()

    @contextmanager
    def _ending_runs(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """When interrupted, starts no further runs, and lets those that are under way save their state."""
        try:
            yield
        except Stopped as stop:
            self._stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)
            raise Stopped(stop.number, "Stopped; the same command goes on from here.") from stop

    def _run(self, cell: Cell) -> str | None:
        """Trains and evaluates one cell in a process of its own; returns what went wrong."""
        folder = folder_in(self.folder, *cell.name.split("/"))
        self._wait_for_other(cell)
        if self._stopping.is_set():
            return "stopped"
        if self.is_done(cell):
            return None
        log_path = folder / LOG_FILE
        refuse_link(log_path)
        with log_path.open("w", encoding="utf-8") as log:
            # In a session of its own, so that Ctrl-C comes to it once, from here. What it reads, and never gets
            # anything from, tells it by its end that this process has ended.
            process = subprocess.Popen(
                [*TRAIN, *self._flags(cell)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            self._processes.add(process)
            if self._stopping.is_set():  # it was started too late to be told with the others
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self._processes.discard(process)
            cast(IO[bytes], process.stdin).close()
        return None if code == 0 else last_line(log_path.read_text(errors="replace")) or f"ended with status {code}"

    def _wait_for_other(self, cell: Cell) -> None:
        """Lets a run come to its end that a command that was killed before has left."""
        holder = command_in(self.folder_of(cell))
        if holder:
            tqdm.write(f"{cell.name} is the work of {holder}; waiting for it.", file=sys.stderr)
        while holder and not self._stopping.wait(SECONDS_BETWEEN_LOOKS):
            holder = command_in(self.folder_of(cell))

    def _environment(self) -> dict[str, str]:
        # In a checkout the package may not be installed: then only this process knows where it is.
        search_path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, PARENT: "1", "PYTHONPATH": search_path}
        if self.options.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.options.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _flags(self, cell: Cell) -> list[str]:
        names = {field.name for field in fields(TrainOptions)}
        values = {
            **{name: value for name, value in asdict(self.options).items() if name in names},
            "method": cell.method,
            "dataset": self.plan.dataset_of(cell.fold),
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
            "output_dir": str(self.folder_of(cell)),
            "resume": True,
        }
        return flags_of(values)

    def _check_finished_runs(self) -> None:
        """Raises a `UserError` if a finished run in the folder was made with other options, weights or images."""
        first_of: dict[tuple[str, str], tuple[Any, Path]] = {}
        defaults = asdict(TrainOptions())  # of what an older version did not know
        for path in sorted(self.folder.glob(f"*/fold-*/rate-*/seed-*/{METRICS_FILE}")):
            folder = path.parent
            metrics, fold = read_metrics(path), folder.parts[-3]
            wanted = {**asdict(self.options), "dataset": self.plan.dataset_of(int(fold.removeprefix("fold-")))}
            done = {**defaults, **metrics["options"]}
            for name in (done.keys() & wanted.keys()) - OPTIONS_OF_A_RUN:
                if done[name] != wanted[name]:
                    raise UserError(
                        f"{folder} was run with {name} {done[name]!r}, and now it is {wanted[name]!r}; give another "
                        "--output-dir."
                    )
            facts = {("images", fold): metrics["data"], ("weights", ""): metrics["weights"]}
            for key, value in facts.items():
                first, other = first_of.setdefault(key, (value, folder)) if value else (value, folder)
                if first != value:
                    raise UserError(
                        f"{folder} is not of the same {key[0]} as {other}; remove the one that is wrong, or give "
                        "another --output-dir."
                    )


def read_metrics(path: Path) -> dict[str, Any]:
    """What a finished run has written.

    Raises:
        UserError: if it is anything else.
    """
    try:
        metrics = read_json(path.read_bytes())
        if isinstance(metrics["options"], dict) and is_number(metrics["validation"]["best_dice"]):
            return {"data": None, "weights": None, **metrics}
    except (ValueError, TypeError, KeyError):
        pass
    raise not_a_run(path)


def not_a_run(path: Path) -> UserError:
    return UserError(f"{path} is not what a finished run writes; remove {path.parent}, and repeat the command.")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""
