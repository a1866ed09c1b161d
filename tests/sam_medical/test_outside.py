"""A backbone, a method and a dataset from outside of the package, used through the commands."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import outside
import pytest
from PIL import Image

from sam_medical.common.errors import UserError
from sam_medical.data import DATASETS
from sam_medical.data.base import Sample
from sam_medical.methods import METHODS
from sam_medical.models import BACKBONES
from sam_medical.training.measures import check_images

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command in a folder of its own, in a process that can import `outside`."""
    folder = tmp_path_factory.mktemp("outside")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }

    def command(name, *flags, cwd=folder):
        arguments = [sys.executable, SCRIPTS / f"{name}.py", *map(str, flags)]
        return subprocess.run(arguments, cwd=cwd, env=environment, text=True, capture_output=True)

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


def test_a_folder_of_images_provides_no_modules(command, tmp_path):
    """Libraries try to import optional packages; one of that name may lie beside the images."""
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / "a.png")
    for package in ("skimage", "ignite", "itk", "pylibjpeg", "cupy"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('executed')")
    flags = ["--adapter", SCRIPTS / "adapters" / "glas", "--images", "images", "--output", "masks"]
    done = command("predict", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "executed" not in done.stderr, done.stderr[-2000:]


MISTAKES = {
    "raises.py": "raise RuntimeError('at import')",
    "broken.py": "def",
    "ends.py": "raise SystemExit(3)",
    "unfinished.py": "from sam_medical.models.backbone import Backbone\nclass Half(Backbone): ...",
    "folder/data.txt": "",
}


@pytest.mark.parametrize(
    "kind, place, message",
    [
        (DATASETS, "raises:X", r"'raises:X' cannot be imported \(RuntimeError: at import\)"),
        (DATASETS, "broken:X", r"'broken:X' cannot be imported \(SyntaxError"),
        (METHODS, "ends:X", r"'ends:X' cannot be imported \(SystemExit: 3\)"),
        (METHODS, "outside:NAME", r"'outside:NAME' does not exist: .*outside\.py has no NAME"),
        (METHODS, "outside:WIDTH", r"'outside:WIDTH' is no method, but int"),
        (METHODS, "folder:X", r"'folder:X' is a folder without code"),
        (BACKBONES, "unfinished:Half", r"'unfinished:Half' lacks blocks, decode, .*; write them"),
        (BACKBONES, "D:sam", r"unknown backbone 'D:sam'; choose from"),
    ],
)
def test_mistakes_in_a_module_are_told(kind, place, message, tmp_path, monkeypatch):
    for name, text in MISTAKES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    before = list(sys.path)
    with pytest.raises(UserError, match=message):
        kind.find(place)
    if not place.startswith("unfinished"):  # that one was found in the current folder
        assert sys.path == before
    for name in ("raises", "broken", "ends", "unfinished", "folder"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": np.zeros((3, 8, 8), np.float32)}, r"image has shape \(3, 8, 8\), but it must be \(H, W, 3\)"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image is uint8, but it must be float32"),
        (
            {"image": np.full((8, 8, 3), 255, np.float32)},
            "image has values from 255.0 to 255.0, but",
        ),
        ({"image": np.full((8, 8, 3), np.nan, np.float32)}, "image has values from nan to nan"),
        ({"masks": np.zeros((2, 8, 9), bool)}, r"masks have shape \(2, 8, 9\)"),
        ({"masks": np.zeros((1, 8, 8), bool)}, "there are 1 masks for 2 labels"),
        ({"masks": np.zeros((2, 8, 8), np.uint8)}, "masks are uint8, but they must be bool"),
        ({"name": "../x"}, "name is '../x', but it must be a file name"),
    ],
)
def test_a_sample_that_is_none_is_told_by_the_dataset_and_its_name(changes, message):
    class Mine(outside.Squares):
        labels = ("a", "b")

        def read(self, index):
            good = Sample("good", np.zeros((8, 8, 3), np.float32), np.zeros((2, 8, 8), bool))
            return good if index else replace(good, **changes)

    dataset = Mine(None, "train")
    assert dataset[1].name == "good"
    with pytest.raises(UserError, match=f"Mine, train: image .* cannot be used: {message}"):
        dataset[0]


def test_two_images_of_one_name_are_told():
    class Twins(outside.Squares):
        def read(self, index):
            return replace(super().read(index), name="twin")

    with pytest.raises(UserError, match="two images of the split train are called 'twin'"):
        check_images({"train": Twins(None, "train")})
