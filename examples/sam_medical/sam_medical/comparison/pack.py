"""Stores all runs of a comparison in four files, from which its report can be rewritten.

runs.csv has one row per run. scores.csv.gz has one row per run, test image and label. history.csv.gz has one row per
run and logged number. report.json contains the values that all runs share. Equal results give equal bytes: runs are
sorted, images keep the dataset's order, and floats are written with enough digits to be read back exactly.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError
from sam_medical.common.files import replacing_file, write_json
from sam_medical.common.json_files import read_json
from sam_medical.comparison.plan import Cell
from sam_medical.comparison.portable import OPTIONS_OF_A_MACHINE
from sam_medical.comparison.results import Moment, Results, RunResult
from sam_medical.evaluation.metrics import MaskScore, score_from_row
from sam_medical.options.commands import CompareOptions

RUNS_FILE = "runs.csv"
SCORES_FILE = "scores.csv.gz"
HISTORY_FILE = "history.csv.gz"
REPORT_FILE = "report.json"
FORMAT = 1
CELL_COLUMNS = [field.name for field in fields(Cell)]
SCORE_COLUMNS = [field.name for field in fields(MaskScore)]
MOMENT_COLUMNS = [field.name for field in fields(Moment)]
# Columns of runs.csv. Its column `environment` is an index into the environments of report.json, from 0.
NUMBERS = (
    *("best_dice", "best_step", "test_dice", "trainable_parameters", "seconds"),
    *("peak_memory_bytes", "processes"),
)
NOT_SHARED = OPTIONS_OF_A_MACHINE
WHOLE_NUMBERS = ("best_step", "trainable_parameters", "peak_memory_bytes", "processes")


def write_pack(results: Results, folder: Path) -> None:
    """Writes the four files, each atomically. report.json is the last; it contains the digests of the others."""
    environments: list[dict[str, str]] = []
    for run in results.runs.values():
        if run.environment not in environments:
            environments.append(run.environment)
    texts = {
        RUNS_FILE: _runs_text(results.runs, environments),
        SCORES_FILE: _scores_text(results.runs),
        HISTORY_FILE: _history_text(results.runs),
    }
    for name, text in texts.items():
        _write_text(folder / name, text)
    options = asdict(results.options)
    content = {
        "format": FORMAT,
        "options": {name: value for name, value in options.items() if name not in NOT_SHARED},
        "labels": results.labels,
        "images": results.images,
        "weights": results.weights,
        "environments": environments,
        "failures": results.failures,
        "sha256 of the text": {name: _digest(text) for name, text in texts.items()},
    }
    write_json(folder / REPORT_FILE, content)


def read_pack(folder: Path) -> Results:
    """Reads the files of `write_pack`.

    Raises:
        UserError: if a file is missing, damaged, or belongs to another report.
    """
    content = _read(folder / REPORT_FILE, _report_of)
    digests = content["sha256 of the text"]
    texts = {name: _read(folder / name, _read_text) for name in (RUNS_FILE, SCORES_FILE, HISTORY_FILE)}
    for name, text in texts.items():
        if digests.get(name) != _digest(text):
            raise UserError(f"{folder / name} is not the one that {REPORT_FILE} was written with; write both anew.")
    try:
        return _results_of(content, texts)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, csv.Error) as error:
        raise UserError(f"{folder} does not hold the files of one report of compare.py.") from error


def _runs_text(runs: Mapping[Cell, RunResult], environments: list[dict[str, str]]) -> str:
    rows = (
        [*astuple(cell), *(getattr(run, name) for name in NUMBERS), environments.index(run.environment)]
        for cell, run in sorted(runs.items(), key=_cell_of)
    )
    return _csv([*CELL_COLUMNS, *NUMBERS, "environment"], rows)


def _scores_text(runs: Mapping[Cell, RunResult]) -> str:
    rows = (
        [*astuple(cell), *astuple(score)] for cell, run in sorted(runs.items(), key=_cell_of) for score in run.scores
    )
    return _csv([*CELL_COLUMNS, *SCORE_COLUMNS], rows)


def _history_text(runs: Mapping[Cell, RunResult]) -> str:
    rows = (
        [*astuple(cell), *astuple(moment)]
        for cell, run in sorted(runs.items(), key=_cell_of)
        for moment in run.history
    )
    return _csv([*CELL_COLUMNS, *MOMENT_COLUMNS], rows)


def _cell_of(item: tuple[Cell, RunResult]) -> Cell:
    return item[0]


def _csv(columns: list[str], rows: Iterable[list[Any]]) -> str:
    """Formats rows as CSV. The csv module writes floats by repr, which is exact."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    """Writes a file, compressed if its suffix is .gz. gzip's time stamp and name are omitted for reproducibility."""
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
                compressed.write(text.encode())
        else:
            file.write(text.encode())


def _read_text(path: Path) -> str:
    """Reads a file and normalises line ends, which a git checkout may have changed."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    """Returns the digest of a text, not of its file: the compressed bytes depend on the version of zlib."""
    return hashlib.sha256(text.encode()).hexdigest()


def _report_of(path: Path) -> dict[str, Any]:
    content = read_json(path.read_bytes())
    if not isinstance(content, dict) or not isinstance(content.get("sha256 of the text"), dict):
        raise ValueError("it is no report")
    if content["format"] != FORMAT:
        raise UserError(f"{path} is of format {content['format']!r}, and this version reads {FORMAT}; take its own.")
    return content


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; give the folder of a report that compare.py has written.") from error
    except (KeyError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not what compare.py writes.") from error


def _results_of(content: Mapping[str, Any], texts: Mapping[str, str]) -> Results:
    scores, history = defaultdict(list), defaultdict(list)
    for row in csv.DictReader(io.StringIO(texts[SCORES_FILE])):
        scores[_cell(row)].append(score_from_row(row))
    for row in csv.DictReader(io.StringIO(texts[HISTORY_FILE])):
        history[_cell(row)].append(Moment(int(row["step"]), row["label"], row["name"], float(row["value"])))
    runs = {}
    for row in csv.DictReader(io.StringIO(texts[RUNS_FILE])):
        cell, environment = _cell(row), content["environments"][int(row["environment"])]
        numbers: dict[str, Any] = {name: _number(name, row[name]) for name in NUMBERS}
        runs[cell] = RunResult(**numbers, environment=environment, scores=scores[cell], history=history[cell])
    return Results(
        options=CompareOptions(**content["options"]),
        labels=list(content["labels"]),
        images={int(fold): splits for fold, splits in content["images"].items()},
        weights=content["weights"],
        runs=runs,
        failures=dict(content["failures"]),
    )


def _cell(row: Mapping[str, str]) -> Cell:
    return Cell(row["method"], int(row["fold"]), int(row["seed"]), float(row["learning_rate"]))


def _number(name: str, text: str) -> float | int | None:
    if name == "peak_memory_bytes" and not text:
        return None
    return int(text) if name in WHOLE_NUMBERS else float(text)
