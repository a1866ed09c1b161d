"""One run with two processes of `accelerate launch`, over gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from sam_medical.cli import evaluate, train
from sam_medical.common.errors import UserError
from sam_medical.common.process import check_processes

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

STEPS = 40
LAUNCHER = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
LAUNCHER += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def flags(options):
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def options(glas_folder, tiny_sam_folder, tiny_clip_folder):
    """A run that is validated at its end only, so that its adapter is what the last step left."""
    return {
        "dataset": "glas",
        "data_root": glas_folder,
        "backbone": tiny_sam_folder,
        "text_encoder": tiny_clip_folder,
        "image_size": 32,
        "steps": STEPS,
        "learning_rate": 0.01,
        "validate_every": STEPS,
    }


@pytest.fixture
def launch(tmp_path):
    """Starts train.py with the launcher, in a process group of its own and with its output in a file."""
    launched = []

    def launch(log, **options):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *LAUNCHER, SCRIPTS / "train.py", *flags(options)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        launched.append(process)
        return process

    yield launch
    for process in launched:
        if process.poll() is None:
            process.terminate()
            process.wait()


def test_two_processes_train_what_one_does_also_after_ctrl_c(launch, run, options, tmp_path):
    two = {**options, "batch_size": 1, "output_dir": tmp_path / "two"}
    log = tmp_path / "log"
    launched = launch(log, **two)
    while not re.search(rf"[1-9]/{STEPS} \[", log.read_text(encoding="utf-8")):  # a first step of both
        assert launched.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.02)
    os.killpg(launched.pid, signal.SIGINT)  # what Ctrl-C does in a terminal
    launched.wait()
    stopped = re.search(r"Stopped after step (\d+)", log.read_text(encoding="utf-8"))
    assert stopped and int(stopped[1]) < STEPS, log.read_text(encoding="utf-8")

    resumed = launch(log, **two, resume=True)
    run(train, **options, batch_size=2, output_dir=tmp_path / "one")
    assert resumed.wait() == 0, log.read_text(encoding="utf-8")
    assert f"Going on after step {stopped[1]} of {STEPS}." in log.read_text(encoding="utf-8")
    assert log.read_text(encoding="utf-8").count("glands  0.") == 1

    files = [{str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*")} for run in ("one", "two")]
    assert {"adapter/adapter_model.safetensors", "metrics.json", "curves.png", "overlays/testA_1.png"} <= files[0]
    assert files[0] == files[1]

    alone, shared = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-4, rtol=1e-4)

    arguments = {"adapter": tmp_path / "two" / "adapter", "data_root": options["data_root"]}
    run(evaluate, **arguments, output=tmp_path / "again.json")
    dice, again = (
        json.loads((tmp_path / path).read_text())["test"]["mean_dice"] for path in ("two/metrics.json", "again.json")
    )
    assert again == pytest.approx(dice, abs=1e-4)


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch):
    """Without a GPU, accelerate lets each train for itself, into one folder, unless told to use the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    check_processes(accelerator)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were launched.* set ACCELERATE_USE_CPU=true"):
        check_processes(accelerator)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED], ids=str)
def test_a_model_that_is_shared_out_is_refused_before_training(kind, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(UserError, match=rf"the launcher uses {kind.value}, .* launch with --multi_gpu"):
        check_processes(Accelerator())
