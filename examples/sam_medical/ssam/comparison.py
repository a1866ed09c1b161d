"""The runs of a comparison: which there are, which are done, and the others one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Event
from typing import IO, Any, cast

from tqdm import tqdm

from ssam.checkpoint import FREE_OPTIONS
from ssam.data import open_splits
from ssam.errors import UserError
from ssam.files import folder_in, refuse_link
from ssam.lock import command_in
from ssam.methods import METHODS
from ssam.metrics import MaskScore, read_scores
from ssam.options import CompareOptions, TrainOptions, flags_of
from ssam.signals import PARENT, Stopped
from ssam.state import read_json
from ssam.values import is_number

TRAIN = Path(__file__).parents[1] / "train.py"
METRICS_FILE = "metrics.json"
LOG_FILE = "log.txt"
SCORES_FILE = "scores.csv"
SECONDS_BETWEEN_LOOKS = 0.5
# What may differ from run to run in one comparison.
OPTIONS_OF_A_RUN = {"method", "seed", "learning_rate", *FREE_OPTIONS}


@dataclass(frozen=True)
class Cell:
    """One run: a method on a fold, with a seed and a learning rate."""

    method: str
    fold: int
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.method}/fold-{self.fold}/rate-{self.learning_rate:g}/seed-{self.seed}"


class Bench:
    """All cells of a comparison, in one folder.

    Attributes:
        options: What to compare.
        rates: The learning rate of each method on each fold; chosen while it runs, by the fold's own validation.
        failures: What a failed cell said last.

    Raises:
        UserError: if a fold cannot be read, or a finished run in the folder was made of other things.
    """

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        self.folds = range(1, (options.folds or 1) + 1)
        self.rates: dict[tuple[str, int], float] = {}
        self.failures: dict[Cell, str] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = Event()
        for fold in self.folds:
            open_splits(self.dataset_of(fold), options.data_root, options.labels, options.reading)
        self._check_finished_runs()

    def run(self) -> None:
        """Runs every cell that is not done, first those by which the learning rates are chosen."""
        pairs = [(method, fold) for method in self.options.method_names for fold in self.folds]
        self._run_all(cell for pair in pairs for cell in self._candidates(*pair))
        for pair in pairs:
            done = [cell for cell in self._candidates(*pair) if self.is_done(cell)]
            if done:
                best = max(done, key=lambda cell: self.metrics(cell)["validation"]["best_dice"])
                self.rates[pair] = best.learning_rate
        self._run_all(Cell(*pair, seed, rate) for pair, rate in self.rates.items() for seed in self._seeds_of(pair[0]))
        self._check_finished_runs()

    def done_seeds(self, method: str) -> dict[int, list[Cell]]:
        """Of the seeds that are done on all folds, the cells at the chosen learning rates."""
        if not all((method, fold) in self.rates for fold in self.folds):
            return {}
        by_seed = {
            seed: [Cell(method, fold, seed, self.rates[method, fold]) for fold in self.folds]
            for seed in self._seeds_of(method)
        }
        return {seed: cells for seed, cells in by_seed.items() if all(map(self.is_done, cells))}

    def describe_rate(self, cell: Cell) -> str:
        """The cell's learning rate, and whether it is an end of those tried, beyond which may lie a better one."""
        rates = sorted(candidate.learning_rate for candidate in self._candidates(cell.method, cell.fold))
        ends = {rates[0]: " (lowest tried)", rates[-1]: " (highest tried)"} if len(rates) > 1 else {}
        return f"{cell.learning_rate:g}{ends.get(cell.learning_rate, '')}"

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def is_done(self, cell: Cell) -> bool:
        return (self.folder_of(cell) / METRICS_FILE).is_file()

    def metrics(self, cell: Cell) -> dict[str, Any]:
        return read_metrics(self.folder_of(cell) / METRICS_FILE)

    def scores(self, cells: Iterable[Cell]) -> list[MaskScore]:
        """Of all images that these cells were tested on."""
        return [score for cell in cells for score in read_scores(self.folder_of(cell) / SCORES_FILE)]

    def dataset_of(self, fold: int) -> str:
        return self.options.dataset.replace("{fold}", str(fold))

    def _seeds_of(self, method: str) -> range:
        return range(self.options.seeds if METHODS[method].is_random else 1)

    def _candidates(self, method: str, fold: int) -> list[Cell]:
        """The cells by which a method's learning rate on a fold is chosen."""
        factors = self.options.factors if METHODS[method].learns else [1.0]
        base = METHODS[method].learning_rate
        return [Cell(method, fold, 0, float(f"{base * factor:.2g}")) for factor in factors]

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
                [sys.executable, str(TRAIN), *self._flags(cell)],
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
        environment = {**os.environ, PARENT: "1"}
        if self.options.jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // self.options.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _flags(self, cell: Cell) -> list[str]:
        values = {
            **{field.name: getattr(self.options, field.name) for field in fields(TrainOptions)},
            "method": cell.method,
            "dataset": self.dataset_of(cell.fold),
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
            wanted = {**asdict(self.options), "dataset": self.dataset_of(int(fold.removeprefix("fold-")))}
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
    raise UserError(f"{path} is not what a finished run writes; remove {path.parent}, and repeat the command.")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""
