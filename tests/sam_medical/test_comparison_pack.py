"""The four files of a comparison's report, from which its table and figures are rewritten."""

import csv
import gzip
import io
import json
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sam_medical.cli import compare
from sam_medical.common.errors import UserError
from sam_medical.comparison.finished import FinishedRuns
from sam_medical.comparison.pack import HISTORY_FILE, REPORT_FILE, RUNS_FILE, SCORES_FILE, read_pack, write_pack
from sam_medical.comparison.plan import Plan
from sam_medical.comparison.portable import portable_options, portable_text
from sam_medical.comparison.report import write_report
from sam_medical.evaluation.metrics import MaskScore, write_scores
from sam_medical.options.commands import CompareOptions

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

PACKED = [REPORT_FILE, RUNS_FILE, SCORES_FILE, HISTORY_FILE]
WRITTEN = ["README.md", "table.csv", "trained_values.png", "curves.png"]
METHODS = ("s-sam", "lora", "zero-shot-point")


@pytest.fixture
def finished(tmp_path):
    """Finished runs of three methods on two folds, in folders with this machine's paths in what they hold."""
    options = CompareOptions(
        output_dir=str(tmp_path / "runs"),
        data_root=str(tmp_path / "images of patients"),
        backbone=str(tmp_path / "sam"),
        dataset="us-{fold}",
        folds=2,
        seeds=2,
        steps=4,
        methods=",".join(METHODS),
        rate_factors="1,3",
        jobs=2,
    )
    plan = Plan(options)
    finished, random = FinishedRuns(plan, tmp_path / "runs"), np.random.default_rng(0)
    candidates = plan.all_candidates
    rates = plan.best_rates({cell: cell.learning_rate for cell in candidates})
    for cell in {*candidates, *plan.with_all_seeds(rates)}:
        write_cell(finished, cell, random)
    return finished


def write_cell(finished, cell, random):
    folder = finished.folder_of(cell)
    folder.mkdir(parents=True)
    options = finished.plan.options
    scores = [
        MaskScore(
            f'image "{number}", {cell.fold}', label, *random_counts(random), *random.random(2), f"p{number // 2}"
        )
        for number in (3, 1, 2, 0)  # in the dataset's order, which is not theirs
        for label in ("liver", "kidney")
    ]
    scores[1] = replace(scores[1], true=0, intersection=0, hausdorff95=None, surface_dice=None)
    write_scores(scores, folder / "scores.csv")
    of_label = {"dice": random.random(), "dice_pooled": None, "images": 4, "trained": True}
    metrics = {
        "options": {
            "output_dir": str(folder),
            "data_root": finished.plan.options.data_root,
            "dataset": f"us-{cell.fold}",
        },
        "test": {"mean_dice": random.random(), "labels": {"liver": {}, "kidney": {}}},
        "validation": {"best_dice": cell.learning_rate, "best_step": 4},
        "trainable_parameters": 1000 + len(cell.method),
        "seconds": 12.3,
        "peak_memory_bytes": None if cell.method == "lora" else 10**9,
        "processes": 1,
        "environment": {"python": "3.11", "machine": f"CPU, {1 + cell.seed} threads"},
        "data": {"train": {"images": 4, "hash": f"0{cell.fold}"}, "test": {"images": 4, "hash": f"1{cell.fold}"}},
        "weights": "3dd5" if cell.method != "lora" else "",
        "history": {
            "losses": list(random.random(4)),
            "validations": [[2, random.random()], [4, random.random()]],
            "label_scores": [{"liver": of_label}, {"liver": of_label}],
        },
    }
    metrics["options"] |= {name: getattr(options, name) for name in ("steps",)}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def image_of(number, cell):
    """A name that a CSV has to quote."""
    return f'image "{number}", {cell.fold}'


def random_counts(random):
    predicted, true = (int(count) for count in random.integers(50, 100, 2))
    return int(random.integers(0, 50)), predicted, true


def contents(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def results(finished, tmp_path):
    """The results of these runs, of which one has failed."""
    reason = f"error: {tmp_path}/images of patients/a/1.png has no mask in {tmp_path}/x.json"
    return finished.results({finished.plan.all_candidates[0]: reason})


@pytest.fixture
def pack(results, tmp_path):
    """The report of these runs, as compare.py leaves it."""
    folder = tmp_path / "report"
    write_pack(results, folder)
    write_report(results, folder)
    return folder


def test_a_report_comes_out_of_its_own_files_as_it_came_out_of_the_runs(results, pack, run, capsys):
    assert read_pack(pack) == results
    before = contents(pack, PACKED + WRITTEN)
    for name in WRITTEN:
        (pack / name).unlink()
    run(compare, report=pack)
    assert "| S-SAM |" in capsys.readouterr().out
    assert contents(pack, PACKED + WRITTEN) == before
    assert {path.name for path in pack.iterdir()} == {*PACKED, *WRITTEN}


def test_the_same_results_give_the_same_bytes(results, pack, tmp_path):
    write_pack(replace(results, runs=dict(reversed(results.runs.items()))), tmp_path / "again")
    assert contents(tmp_path / "again", PACKED) == contents(pack, PACKED)


def test_every_run_has_a_row_and_its_scores_to_the_last_digit(finished, pack):
    with (pack / RUNS_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(finished.folder.rglob("metrics.json"))) == 14
    assert [row["method"] for row in rows] == sorted(row["method"] for row in rows)
    text = gzip.decompress((pack / SCORES_FILE).read_bytes()).decode()
    packed = [[row["image"], row["label"], row["surface_dice"]] for row in csv.DictReader(io.StringIO(text))]
    written = []
    for row in rows:
        folder = f"{row['method']}/fold-{row['fold']}/rate-{float(row['learning_rate']):g}/seed-{row['seed']}"
        with (finished.folder / folder / "scores.csv").open(newline="") as file:
            written += [[score["image"], score["label"], score["surface_dice"]] for score in csv.DictReader(file)]
    assert packed == written


def test_no_packed_file_holds_a_path_of_this_machine(pack, tmp_path):
    for name, content in contents(pack, PACKED + WRITTEN).items():
        content = gzip.decompress(content) if name.endswith(".gz") else content
        for place in (tmp_path, Path.home(), Path(__file__).parents[2]):
            assert str(place).encode() not in content, name
    report = json.loads((pack / REPORT_FILE).read_text())
    assert list(report["failures"].values()) == ["error: DATA/a/1.png has no mask in x.json"]
    assert report["options"]["data_root"] == "DATA" and report["options"]["backbone"] == "sam"
    assert not {"output_dir", "jobs", "report"} & report["options"].keys()
    assert "--data-root DATA --backbone sam" in (pack / "README.md").read_text()


@pytest.mark.parametrize(
    "text, portable",
    [
        ("error: /data/of me/a.png: no such file", "error: DATA/a.png: no such file"),
        ("/data/of men/a.png", "of men/a.png"),
        ("see '/opt/x/y.json' and C:\\Users\\me\\z.json.", "see 'y.json' and z.json."),
        ("a/b of https://example.org/x/y and facebook/sam-vit-base, 3/4", None),
        ("the work of process 3 on {host}", "the work of process 3 on HOST"),
    ],
)
def test_messages_keep_names_and_lose_places(text, portable):
    options = CompareOptions(data_root="/data/of me", output_dir="runs/x")
    text = text.format(host=socket.gethostname())
    assert portable_text(text, options) == (text if portable is None else portable)


@pytest.mark.parametrize(
    "given, portable",
    [("facebook/sam-vit-base", "facebook/sam-vit-base"), ("/opt/weights/sam.pth", "sam.pth"), ("../sam", "sam")],
)
def test_a_base_model_keeps_its_own_name(given, portable):
    assert portable_options(CompareOptions(backbone=given)).backbone == portable


@pytest.mark.parametrize("name", PACKED)
def test_a_missing_or_damaged_file_is_named(pack, name):
    content = (pack / name).read_bytes()
    for damaged in (b"", b"[]", content[: len(content) // 2], gzip.compress(b"a,b\n1,2\n")):
        (pack / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            read_pack(pack)
    (pack / name).unlink()
    with pytest.raises(UserError, match=f"there is no .*{name}"):
        read_pack(pack)


def test_files_of_two_reports_are_not_taken_for_one(results, pack, tmp_path):
    """As a kill between two of them would leave."""
    write_pack(replace(results, runs=dict(list(results.runs.items())[:-1])), tmp_path / "other")
    (pack / RUNS_FILE).write_bytes((tmp_path / "other" / RUNS_FILE).read_bytes())
    with pytest.raises(UserError, match=r"runs\.csv is not the one that report\.json was written with"):
        read_pack(pack)


def test_line_ends_of_a_checkout_do_not_matter(results, pack):
    content = (pack / RUNS_FILE).read_bytes()
    (pack / RUNS_FILE).write_bytes(content.replace(b"\n", b"\r\n"))
    assert read_pack(pack) == results


def test_a_report_of_another_version_is_refused(pack):
    report = json.loads((pack / REPORT_FILE).read_text())
    for change, message in (({"format": 2}, "is of format 2"), ({"options": {"magic": 1}}, "does not hold the files")):
        (pack / REPORT_FILE).write_text(json.dumps({**report, **change}))
        with pytest.raises(UserError, match=message):
            read_pack(pack)


def test_report_goes_with_no_other_option(pack, run, refused):
    with refused("report is .*; leave the other options out"):
        run(compare, report=pack, methods="lora")


def test_the_published_reports_are_what_their_files_give(tmp_path):
    for folder in (SCRIPTS / "results").iterdir():
        write_report(read_pack(folder), tmp_path / folder.name)
        for name in ("README.md", "table.csv"):
            assert (tmp_path / folder.name / name).read_text() == (folder / name).read_text()
