"""compare.py: the runs of a comparison, repeated commands, and the table."""

import csv
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sam_medical.cli import compare
from sam_medical.common.errors import UserError
from sam_medical.comparison import run as comparison
from sam_medical.comparison.finished import FinishedRuns
from sam_medical.comparison.plan import Cell, Plan
from sam_medical.comparison.report import Row, comparison_table
from sam_medical.comparison.runner import Runner, last_line
from sam_medical.evaluation.metrics import MaskScore, mean_scores, read_scores, score_labels, write_scores
from sam_medical.methods import METHODS
from sam_medical.options.commands import CompareOptions

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

RATES = (0.0015, 0.005, 0.015)


def opened(**options):
    """The finished runs of a comparison whose data and folder have been checked."""
    plan = Plan(CompareOptions(**options))
    comparison.check_data(plan)
    finished = FinishedRuns(plan, Path(plan.options.output_dir))
    finished.check()
    return finished


def run_all(**options):
    """The finished runs of a comparison, after all that was missing has been run."""
    finished = opened(**options)
    Runner(finished).run()
    finished.check()
    return finished


@pytest.fixture
def options(glas_folder, tiny_sam_folder, tiny_clip_folder, tmp_path):
    return {
        "dataset": "glas",
        "data_root": str(glas_folder),
        "output_dir": str(tmp_path / "bench"),
        "backbone": str(tiny_sam_folder),
        "text_encoder": str(tiny_clip_folder),
        "image_size": 32,
        "steps": 4,
        "batch_size": 2,
        "warmup_steps": 1,
        "validate_every": 4,
        "augmentation": "any-orientation",
        "seeds": 2,
    }


@pytest.fixture
def run(run):
    return functools.partial(run, compare)


def test_one_command_trains_evaluates_and_reports(run, options, tmp_path, capsys, refused):
    options["methods"] = "s-sam,u-net,zero-shot-point"
    run(**options, rate_factors="1")
    folder = tmp_path / "bench"
    runs = sorted(path.parent for path in folder.rglob("metrics.json"))
    assert [str(path.relative_to(folder)) for path in runs] == [
        "s-sam/fold-1/rate-0.005/seed-0",
        "s-sam/fold-1/rate-0.005/seed-1",
        "u-net/fold-1/rate-0.002/seed-0",
        "u-net/fold-1/rate-0.002/seed-1",
        "zero-shot-point/fold-1/rate-0.005/seed-0",
    ]
    with (folder / "report" / "table.csv").open() as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    for method, title in (("s-sam", "S-SAM"), ("u-net", "U-Net"), ("zero-shot-point", "zero-shot, point")):
        scores = [read_scores(path / "scores.csv") for path in runs if f"/{method}/" in str(path)]
        assert table[title]["Dice"] == f"{np.mean([s.dice for run in scores for s in run]):.3f}"
        assert f"({len(scores)})" in table[title]["min - max of seeds"]
    trained = json.loads((runs[0] / "metrics.json").read_text())["trainable_parameters"]
    assert (table["S-SAM"]["trained values"], table["zero-shot, point"]["trained values"]) == (f"{trained:,}", "0")
    assert table["zero-shot, point"]["expert's hints"] == "point" and table["U-Net"]["p (Holm)"]
    report = (folder / "report" / "README.md").read_text()
    assert "Dice less S-SAM's" in table["U-Net"]
    assert "    python examples/sam_medical/compare.py --dataset glas" in report
    assert "| S-SAM |" in report and "| S-SAM |" in capsys.readouterr().out
    for picture in ("trained_values.png", "curves.png", "masks.png"):
        assert min(Image.open(folder / "report" / picture).size) > 100

    finished = {path: (path / "metrics.json").stat().st_mtime_ns for path in runs}
    run(**options, rate_factors="1")
    assert finished == {path: (path / "metrics.json").stat().st_mtime_ns for path in runs}
    with refused(r"seed-0 was run with steps 4, and now it is 6; give another --output-dir"):
        run(**{**options, "steps": 6})


def test_a_run_that_fails_is_reported_and_the_others_go_on(run, options, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 of the runs have failed"):
        run(**{**options, "batch_size": 1, "seeds": 1}, methods="segnet,u-net", rate_factors="1", jobs=2)
    report = (tmp_path / "bench" / "report" / "README.md").read_text()
    assert "- `segnet/fold-1/rate-0.002/seed-0`: error: SegNet uses batch norm" in report
    assert "| U-Net |" in report and "| SegNet |" not in report


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces training: Dice is a function of the run's flags."""

    def fake_training(dice_of, weights_of=lambda flags: "0123"):
        def call(command, **_):
            flags = dict(zip(command[2::2], command[3::2], strict=True))
            folder, fold = Path(flags["--output-dir"]), int(flags["--fold"]) if "--fold" in flags else None
            validation, of_images = dice_of(flags)
            scores = [MaskScore(name, "liver", round(100 * dice), 100, 100) for name, dice in of_images.items()]
            write_scores(scores, folder / "scores.csv")
            values = {
                "options": {"steps": int(flags["--steps"]), "dataset": flags["--dataset"], "fold": fold},
                "validation": {"best_dice": validation, "best_step": 4},
                "test": {"mean_dice": 0.5, "labels": {"liver": {}}},
                "trainable_parameters": 10,
                "seconds": 1.5,
                "peak_memory_bytes": None,
                "processes": 1,
                "environment": {"python": "3"},
                "history": {"losses": [], "validations": []},
                "weights": weights_of(flags),
                "data": {"train": {"images": 3, "hash": flags["--dataset"] + flags.get("--fold", "")}},
            }
            (folder / "metrics.json").write_text(json.dumps(values))
            trained.append(flags)
            return type("Process", (), {"wait": lambda self: 0, "stdin": io.BytesIO()})()

        trained = []
        monkeypatch.setattr(subprocess, "Popen", call)
        monkeypatch.setattr(comparison, "open_splits", lambda *_: None)
        return trained

    return fake_training


def test_learning_rates_are_chosen_on_validation_and_never_on_test(fake_training, tmp_path):
    def dice_of(flags):
        rate = float(flags["--learning-rate"])
        return -abs(rate - 0.006), {"a": min(1, 10 * rate)}  # the test images like large ones

    trained = fake_training(dice_of)
    finished = run_all(output_dir=str(tmp_path), methods="s-sam", seeds=3, rate_factors="0.3,1,3")
    results = finished.results({})
    assert results.rates == {("s-sam", 1): 0.005}
    cell = results.done_seeds("s-sam")[0][0]
    rates = [finished.plan.describe_rate(replace(cell, learning_rate=rate)) for rate in RATES]
    assert rates == ["0.0015 (lowest tried)", "0.005", "0.015 (highest tried)"]
    assert sorted((flags["--learning-rate"], flags["--seed"]) for flags in trained) == [
        ("0.0015", "0"),
        ("0.005", "0"),
        ("0.005", "1"),
        ("0.005", "2"),
        ("0.015", "0"),
    ]


def test_folds_make_one_test_set(fake_training, tmp_path):
    trained = fake_training(lambda flags: (0.5, {f"image of {flags['--dataset']}": 0.1 * int(flags["--dataset"][-1])}))
    options = {"folds": 3, "methods": "lora", "seeds": 2, "rate_factors": "1"}
    results = run_all(output_dir=str(tmp_path), dataset="us-{fold}", **options).results({})
    seeds = results.done_seeds("lora")
    assert list(seeds) == [0, 1] and len(trained) == 6
    scores = results.scores(seeds[1])
    assert [(s.image, s.dice) for s in scores] == [(f"image of us-{k}", pytest.approx(0.1 * k)) for k in (1, 2, 3)]


def test_each_fold_has_its_own_rate_by_its_own_validation(fake_training, tmp_path):
    """The validation images of a fold are the test images of another fold."""
    fake_training(
        lambda flags: (-abs(float(flags["--learning-rate"]) - 0.002 * int(flags["--dataset"][-1])), {"a": 1})
    )
    options = {"folds": 2, "methods": "lora", "rate_factors": "1,2"}
    results = run_all(output_dir=str(tmp_path), dataset="us-{fold}", **options).results({})
    assert results.rates == {("lora", 1): 0.002, ("lora", 2): 0.004}
    assert [cell.learning_rate for cell in results.done_seeds("lora")[2]] == [0.002, 0.004]


def test_runs_of_something_else_are_not_taken_for_these(fake_training, tmp_path):
    fake_training(lambda flags: (0.5, {"a": 0.5}), weights_of=lambda flags: flags["--method"])
    options = {"output_dir": str(tmp_path), "methods": "lora", "rate_factors": "1", "seeds": 1}
    run_all(**options)
    with pytest.raises(UserError, match="was run with dataset 'brain-mri', and now it is 'glas'"):
        opened(**options, dataset="glas")
    # What a run's record does not name was as it is by default.
    with pytest.raises(UserError, match="was run with choose_by 'pooled-dice', and now it is 'dice'"):
        opened(**options, choose_by="dice")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "metrics.json").write_text('{"test": {}}')
    opened(**options)
    with pytest.raises(UserError, match=r"s-sam/.* is not of the same weights as .*lora/"):
        run_all(**{**options, "methods": "lora,s-sam"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": "s-sam,s-sam"}, "methods is 's-sam,s-sam', but it names one twice"),
        ({"methods": "s-sam,magic"}, "methods names 'magic', but the methods are"),
        ({"dataset": "us-{fold}"}, "must be given with {fold} in dataset"),
        ({"rate_factors": "1,-1"}, "must be numbers above 0"),
        ({"dataset": "glas", "data_root": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_found_before_anything_runs(options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        opened(output_dir=str(tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_a_seed_counts_once_all_of_its_folds_are_done(fake_training, tmp_path):
    fake_training(lambda flags: (0.5, {"a": 0.5}))
    options = {"folds": 2, "methods": "lora", "seeds": 2, "rate_factors": "1"}
    finished = run_all(output_dir=str(tmp_path), dataset="us-{fold}", **options)
    (finished.folder_of(finished.results({}).done_seeds("lora")[1][-1]) / "metrics.json").unlink()
    assert list(finished.results({}).done_seeds("lora")) == [0]


@pytest.fixture
def compare_long(options):
    """Starts a comparison in a process of its own, whose first run would take long."""
    command = [sys.executable, SCRIPTS / "compare.py", "--methods", "s-sam", "--rate_factors", "1", "--steps", "10000"]
    command += [part for name, value in options.items() if name != "steps" for part in (f"--{name}", str(value))]
    started = []

    def start():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def cell(tmp_path):
    return tmp_path / "bench" / "s-sam" / "fold-1" / "rate-0.005" / "seed-0"


def wait_for_state(cell, process):
    while not list(cell.glob("checkpoint/step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_run_save_its_state_and_starts_no_other(number, compare_long, cell):
    process = compare_long()
    wait_for_state(cell, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Stopped; the same command goes on from here." in error
    assert "repeat the command with --resume" in (cell / "log.txt").read_text()
    assert not cell.with_name("seed-1").exists()


def test_killed_it_leaves_no_run_and_a_repeated_one_waits_for_those_that_live(compare_long, cell):
    process = compare_long()
    wait_for_state(cell, process)
    run = json.loads((cell / ".lock").read_text())["pid"]
    os.kill(run, signal.SIGSTOP)  # as if it still had much to save
    process.kill()
    process.communicate()
    again = compare_long()
    line = again.stderr.readline()
    while "waiting for it" not in line:
        assert line, "it has ended"
        line = again.stderr.readline()
    assert f"s-sam/fold-1/rate-0.005/seed-0 is in use by process {run} on " in line
    os.kill(run, signal.SIGCONT)
    while "Going on after step" not in (cell / "log.txt").read_text():
        assert again.poll() is None
        time.sleep(0.1)
    assert json.loads((cell / ".lock").read_text())["pid"] != run
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=60) == 143


def test_a_damaged_record_of_a_run_is_named(fake_training, tmp_path):
    fake_training(lambda flags: (0.5, {"a": 0.5}))
    options = {"output_dir": str(tmp_path), "methods": "lora", "rate_factors": "1", "seeds": 1}
    run_all(**options)
    (path,) = tmp_path.rglob("metrics.json")
    for content in ("", "[]", '{"options": 3}', "[" * 100_000, '{"options": {}, "validation": {"best_dice": null}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"metrics\.json is not what a finished run writes; remove"):
            opened(**options)
    path.write_text('{"options": {}, "validation": {"best_dice": 0.5}}')
    with pytest.raises(UserError, match=r"metrics\.json is not what a finished run writes; remove"):
        opened(**options)


def test_where_images_are_blank_the_difference_stands_also_without_them():
    """One method finds the liver and alarms where there is none, the other draws nothing anywhere."""

    def row(method, intersection, predicted, alarm):
        scores = [MaskScore("a", "liver", intersection, predicted, 100), MaskScore("b", "liver", 0, alarm, 0)]
        scores += [MaskScore("c", "liver", intersection, predicted, 100)]
        by_label = score_labels(scores, ["liver"])
        dice = by_label["liver"].dice
        return Row(method, [Cell(method, 1, 0, 0.005)], [dice], scores, mean_scores(by_label), {}, 10, 1.0, None)

    rows = [row("s-sam", 80, 100, 9), row("lora", 0, 0, 0)]
    columns, table = comparison_table(SimpleNamespace(describe_rate=lambda cell: ""), rows)
    lora = dict(zip(columns, table[1], strict=True))
    assert lora["Dice less S-SAM's"].startswith(f"{1 / 3 - 2 * 0.8 / 3:+.4f}")
    assert lora["present less S-SAM's"].startswith("-0.8000")

    everywhere = [replace(r, scores=[score for score in r.scores if score.true]) for r in rows]
    columns, table = comparison_table(SimpleNamespace(describe_rate=lambda cell: ""), everywhere)
    assert "present less S-SAM's" not in columns and all(len(line) == len(columns) for line in table)


def test_what_a_run_said_last():
    assert last_line("10%\r20%\rTraceback\nerror: no\n\n") == "error: no"
    assert last_line("") == ""


def test_a_fold_is_an_argument_and_its_old_name_stays_the_same_run(fake_training, tmp_path):
    """A comparison that an older version began, with the fold in the dataset's name, goes on."""
    trained = fake_training(lambda flags: (0.5, {f"image of fold {flags.get('--fold')}": 0.5}))
    options = {"output_dir": str(tmp_path), "folds": 5, "methods": "lora", "seeds": 1, "rate_factors": "1"}
    run_all(**options, dataset="abdominal-us-real")
    assert [(flags["--dataset"], flags["--fold"]) for flags in trained] == [
        ("abdominal-us-real", str(fold)) for fold in range(1, 6)
    ]
    for fold in range(1, 6):
        (path,) = tmp_path.glob(f"lora/fold-{fold}/*/*/metrics.json")
        record = json.loads(path.read_text())
        record["options"] = {"dataset": f"abdominal-us-real-{fold}", "steps": record["options"]["steps"]}
        path.write_text(json.dumps(record))
    opened(**options, dataset="abdominal-us-real")
    opened(**options, dataset="abdominal-us-real-{fold}")
    with pytest.raises(UserError, match=r"was run with dataset 'abdominal-us-real', and now it is 'abdominal-us'"):
        opened(**{**options, "folds": None}, dataset="abdominal-us")
    with pytest.raises(UserError, match="folds is None, but it must be from 1 to 5, the folds of abdominal-us-real"):
        opened(**{**options, "folds": None}, dataset="abdominal-us-real")


def test_a_method_of_ones_own_is_run_with_its_extension(fake_training, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "_values", {**METHODS._values, "mine:SLIM": METHODS["lora"]})
    trained = fake_training(lambda flags: (0.5, {"a": 0.5}))
    options = {"methods": "s-sam,mine:SLIM", "extensions": ["mine"], "rate_factors": "1", "seeds": 1}
    finished = run_all(output_dir=str(tmp_path), **options)
    assert trained[1]["--method"] == "mine:SLIM" and trained[1]["--extensions"] == "mine"
    assert list(tmp_path.glob("mine.SLIM/fold-1/rate-*/seed-0/metrics.json"))
    assert list(finished.results({}).done_seeds("mine:SLIM")) == [0]
