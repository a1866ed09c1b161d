"""A backbone, a method and a dataset from outside of the package, used through the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command in a folder of its own, in a process that can import `outside`."""
    folder = tmp_path_factory.mktemp("outside")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}

    def command(name, *flags):
        arguments = [sys.executable, SCRIPTS / f"{name}.py", *map(str, flags)]
        return subprocess.run(arguments, cwd=folder, env=environment, text=True, capture_output=True)

    command.folder = folder
    return command


@pytest.fixture(scope="module")
def trained(command):
    places = ["--dataset", "outside:Squares", "--backbone", "outside:Patches", "--method", "outside:SHIFT_ONLY"]
    few = ["--image-size", 32, "--steps", 60, "--batch-size", 4, "--validate-every", 60, "--prompt", "learned"]
    done = command("train", *places, *few, "--output-dir", "run", "--overlays", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((command.folder / "run" / "metrics.json").read_text())


def test_they_train(trained):
    assert trained["test"]["mean_dice"] > 0.6
    losses = trained["history"]["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_their_adapter_is_loaded_by_who_names_the_module(trained, command):
    extensions = ["--extensions", "outside"]
    scored = command("evaluate", "--adapter", "run/adapter", "--output", "scores.json", *extensions)
    assert scored.returncode == 0, scored.stderr[-2000:]
    again = json.loads((command.folder / "scores.json").read_text())
    assert again["test"]["mean_dice"] == pytest.approx(trained["test"]["mean_dice"], abs=1e-5)


def test_a_name_in_an_adapters_file_imports_nothing(trained, command):
    refused = command("evaluate", "--adapter", "run/adapter")
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert refused.returncode == 2 and "if you trust its code, give --extensions outside" in line
