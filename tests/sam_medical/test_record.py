"""A run's record: what is written is read again, also from older versions, and holds no place of the machine."""

import json
from dataclasses import replace

import pytest

from sam_medical.common.errors import UserError
from sam_medical.training.record import FORMAT, RunRecord, portable_options

RECORD = RunRecord(
    test={"mean_dice": 0.5, "mean_dice_interval": None, "labels": {"liver": {"dice": 0.5}}},
    best_dice=0.75,
    best_step=4,
    trainable_parameters=10,
    seconds=1.5,
    peak_memory_bytes=None,
    data={"train": {"images": 3, "hash": "0123"}},
    weights="3dd5",
    environment={"python": "3.11"},
    processes=1,
    options={"steps": 4, "dataset": "abdominal-us-real", "fold": 2, "backbone": "sam.pth"},
    history={"losses": [1.0, 0.5], "validations": [(2, 0.75)], "label_scores": [{"liver": {"dice": 0.75}}]},
)


@pytest.fixture
def path(tmp_path):
    RECORD.write(tmp_path / "metrics.json")
    return tmp_path / "metrics.json"


def test_a_record_is_read_as_it_was_written(path):
    assert RunRecord.read(path) == RECORD and RECORD.labels == ["liver"]


def test_a_record_of_an_older_version_is_read(path):
    content = json.loads(path.read_text())
    del content["format"], content["data"], content["weights"], content["history"]["label_scores"]
    content["options"] = {
        **{"steps": 4, "dataset": "abdominal-us-real-2", "backbone": "/elsewhere/sam.pth"},
        **{"data_root": "/elsewhere/data", "output_dir": "/elsewhere/run", "resume": True, "overwrite": False},
    }
    path.write_text(json.dumps(content))
    history = {**RECORD.history, "label_scores": []}
    assert RunRecord.read(path) == replace(RECORD, data={}, weights="", history=history)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": FORMAT + 1},
        {"format": "x"},
        {"validation": {"best_dice": None, "best_step": 4}},
        {"validation": {"best_dice": 0.5, "best_step": 0.5}},
        {"test": {"mean_dice": 0.5}},
        {"test": {"mean_dice": "x", "labels": {}}},
        {"processes": None},
        {"options": 3},
        {"environment": None},
        {"history": []},
        {"history": {"losses": ["x"], "validations": []}},
        {"history": {"losses": [], "validations": [3]}},
        {"peak_memory_bytes": "much"},
    ],
)
def test_anything_else_is_refused_in_one_line(path, changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=r"metrics\.json is not what a finished run writes; remove") as error:
        RunRecord.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, portable",
    [
        ({"text_encoder": "openai/clip-vit-base-patch32"}, {"text_encoder": "openai/clip-vit-base-patch32"}),
        ({"text_encoder": "../models/clip", "data_root": "x"}, {"text_encoder": "clip"}),
        ({"backbone": "C:\\models\\sam.pth"}, {"backbone": "sam.pth"}),
        ({"dataset": "abdominal-us-real-2", "fold": None}, {"dataset": "abdominal-us-real", "fold": 2}),
        ({"dataset": "glas", "fold": None}, {"dataset": "glas", "fold": None}),
        ({"dataset": "us-2"}, {"dataset": "us-2"}),
    ],
)
def test_options_keep_names_and_lose_places(options, portable):
    assert portable_options(options) == portable
