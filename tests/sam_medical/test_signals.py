"""Signals: a run saves its state, ends its workers, and exits with the signal's status."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sam_medical.common.signals import Interruption, Stopped, stopping_at_signals

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

STEPS = 10_000


@pytest.fixture
def launch(glas_folder, tiny_sam_folder, tiny_clip_folder, tmp_path):
    """Starts a long run in a process group of its own, and waits for its first steps."""
    options = {
        "dataset": "glas",
        "data_root": glas_folder,
        "output_dir": tmp_path / "run",
        "backbone": tiny_sam_folder,
        "text_encoder": tiny_clip_folder,
        "image_size": 32,
        "steps": STEPS,
        "batch_size": 2,
        "validate_every": STEPS,
        "num_workers": 2,
    }
    started = []

    def launch(*before, **changes):
        flags = [f"--{name}={value}" for name, value in {**options, **changes}.items()]
        with (tmp_path / "log").open("w") as log:
            command = [*before, sys.executable, SCRIPTS / "train.py", *flags]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        while not re.search(rf"[1-9]\d*/{STEPS} \[", (tmp_path / "log").read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_leaves_no_process(number, launch, tmp_path):
    process = launch()
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # as from a launcher that passes it on
    assert process.wait(timeout=60) == 128 + number, (tmp_path / "log").read_text()
    assert group_is_gone(process)
    log = (tmp_path / "log").read_text()
    step = re.search(r"Stopped after step (\d+); repeat the command with --resume to go on", log)[1]
    assert "Traceback" not in log
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == [f"step-{step}"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "history.json"]


def test_nohup_keeps_a_hangup_from_stopping_it(launch, tmp_path):
    process = launch("nohup", num_workers=0)
    os.killpg(process.pid, signal.SIGHUP)
    before = (tmp_path / "log").stat().st_size
    while (tmp_path / "log").stat().st_size < before + 2000:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_a_second_ctrl_c_stops_at_once_if_it_is_another_wish(monkeypatch):
    with Interruption() as interruption:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert interruption.number == signal.SIGTERM
        monkeypatch.setattr("sam_medical.common.signals.SECONDS_OF_ONE_REQUEST", 0.0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_what_was_set_before_is_set_again():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with stopping_at_signals(), pytest.raises(Stopped) as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.value.number == signal.SIGHUP
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
