"""Saved states of a run: damage is detected, and nothing in them is executed."""

import copy
import hashlib
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from sam_medical.common.errors import UserError
from sam_medical.evaluation.metrics import LabelScores
from sam_medical.methods.tuners import InPlaceTuner
from sam_medical.training.progress import Progress
from sam_medical.training.run_state import Training, as_json
from sam_medical.training.run_states import Checkpoints, check_states

STEPS = 8
RUN = {"steps": STEPS, "labels": ["gland"], "processes": 1, "learning_rate": 0.01}
FILES = ("adapter.safetensors", "manifest.json", "optimizer.safetensors", "random-0.json", "run.json", "state.json")
SCORES = {"gland": LabelScores(0.5, 0.5, None, 0.25, 1.0, 0.5, None, 2, 1)}


class Run:
    """A small run whose every step takes random numbers of all kinds."""

    def __init__(self, output, run=RUN):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        optimizer = AdamW([{"params": [*self.model[0].parameters()], "lr": 0.1}, {"params": self.model[1].weight}])
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        self.training = Training(self.model, InPlaceTuner(), optimizer, scheduler, None, ["gland"])
        self.checkpoints = Checkpoints(Accelerator(cpu=True), output, run, self.training)
        self.progress = Progress()

    def step(self):
        numbers = torch.rand(5, 3) + random.random() + np.random.rand()
        loss = self.model(numbers).square().mean()
        loss.backward()
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()
        self.training.scheduler.step()
        self.progress.add_step(loss.item())

    def go(self, steps, saved_at=()):
        while self.progress.step < steps:
            self.step()
            if self.progress.step in saved_at:
                self.progress.add_validation(random.random(), SCORES)
                self.checkpoints.save(self.progress)
        return self

    def resume(self):
        self.progress = self.checkpoints.resume(STEPS) or self.progress
        return self


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with states of its steps 3 and 5, and the losses of all its steps."""
    run = Run(tmp_path_factory.mktemp("whole")).go(STEPS, saved_at=(1, 3, 5))
    return run.checkpoints._output, run.progress.losses


@pytest.fixture
def output(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_two_states_are_kept_and_nothing_beside_them(output):
    assert sorted(path.name for path in output.rglob("*")) == sorted(["checkpoint", "step-3", "step-5", *FILES * 2])
    assert len({path.stat().st_mode for path in output.rglob("*.*")}) == 1


def test_a_resumed_run_is_the_same_to_the_last_bit(output, whole):
    resumed = Run(output).resume()
    assert resumed.progress.step == 5 and resumed.progress.validations[0][0] == 1
    assert resumed.go(STEPS).progress.losses == whole[1]


def test_a_run_without_a_state_begins_anew(tmp_path):
    (tmp_path / "checkpoint" / ".ssam-new-half").mkdir(parents=True)
    assert Run(tmp_path).resume().progress.step == 0


def damage_missing(path):
    path.unlink()


def damage_empty(path):
    path.write_bytes(b"")


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def damage_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [damage_missing, damage_empty, damage_truncated, damage_folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_named_and_the_one_before_it_taken(name, damage, output, whole, capsys):
    damage(output / "checkpoint" / "step-5" / name)
    check_states(output / "checkpoint")
    run = Run(output).resume()
    (line,) = capsys.readouterr().out.splitlines()
    assert f"step-5/{name} is damaged" in line and "going on from the state before it" in line
    assert run.progress.step == 3
    # The state of step 5 is saved again in the place of the damaged one.
    assert run.go(STEPS, saved_at=(5,)).progress.losses == whole[1]
    assert Run(output).resume().progress.step == 5

    damage(output / "checkpoint" / "step-5" / name)
    damage(output / "checkpoint" / "step-3" / name)
    message = (
        rf"step-5/{name} is damaged \(.*\), and no state before it is whole; remove .*checkpoint to start anew\.$"
    )
    for check in (Run(output).resume, lambda: check_states(output / "checkpoint")):
        with pytest.raises(UserError, match=message):
            check()


def test_a_state_that_was_passed_over_does_not_outlive_a_newer_one(output):
    damage_empty(output / "checkpoint" / "step-5" / "run.json")
    Run(output).resume().go(4, saved_at=(4,))
    assert sorted(path.name for path in (output / "checkpoint").iterdir()) == ["step-3", "step-4"]


def test_every_flipped_bit_is_noticed(output, capsys):
    draw = random.Random(0)
    for name in FILES:
        path = output / "checkpoint" / "step-5" / name
        content = path.read_bytes()
        for _ in range(40):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            assert Run(output).resume().progress.step == 3, name
            assert f"{path} is damaged" in capsys.readouterr().out
        path.write_bytes(content)
    assert Run(output).resume().progress.step == 5


def sign(folder, files):
    """Replaces files of a state, and updates their digests as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["digest"]
    for name, content in files.items():
        (folder / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(as_json(manifest)).hexdigest()
    (folder / "manifest.json").write_bytes(as_json({**manifest, "digest": digest}))


BAD_VALUES = (None, True, -1, 10**18, 10**400, 1e308, "x", [], {}, [[[]]], [None] * 5)


def places(content, path=()):
    """Yields every position in nested lists and dicts, but only the first two of long lists."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content[:2])
    for key, value in items if isinstance(content, (dict, list)) else ():
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def replaced(content, path, value):
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize("name", ["state.json", "random-0.json"])
def test_values_that_cannot_be_are_refused_also_where_the_digests_fit(name, output, whole, capsys):
    folder = output / "checkpoint" / "step-5"
    content = json.loads((folder / name).read_bytes())
    draw, accepted = random.Random(0), []
    for path in places(content):
        for value in draw.sample([value for value in BAD_VALUES if value != {} or path != ("scaler",)], 5):
            sign(folder, {name: json.dumps(replaced(content, path, value)).encode()})
            run = Run(output).resume()
            if run.progress.step == 5:
                accepted.append(path[-1])
                run.go(STEPS)
    # Numbers of which any is possible, and a score that may be missing.
    free = {"seconds", "dice", "dice_present", "dice_pooled", "iou", "hausdorff95", "surface_dice", "false_alarms"}
    assert set(map(str, accepted)) <= free | {"images", "images_present", "trained", "0", "1", "2", "3"}


@pytest.mark.parametrize("content", [b"NaN", b"[" * 100_000, b'{"progress": NaN}', b"\xff\xfe"])
def test_what_is_not_json_is_refused(content, output):
    sign(output / "checkpoint" / "step-5", {"state.json": content})
    assert Run(output).resume().progress.step == 3


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "step-5/model.bin", "step-5/x.pkl"]
)
def test_pickles_are_refused_and_never_read(name, output, tmp_path):
    path = output / "checkpoint" / name
    path.write_bytes(pickle.dumps(Payload(tmp_path / "harm")))
    for check in (Run(output).resume, lambda: check_states(output / "checkpoint")):
        with pytest.raises(UserError, match=r"can run code .*, and is not read; remove .*checkpoint to start anew"):
            check()
    assert not (tmp_path / "harm").exists()


def test_pickled_tensors_under_the_name_of_a_file_are_refused(output, tmp_path):
    harm = pickle.dumps(Payload(tmp_path / "harm"))
    sign(output / "checkpoint" / "step-5", {"optimizer.safetensors": harm})
    assert Run(output).resume().progress.step == 3
    assert not (tmp_path / "harm").exists()


def test_strange_files_and_links_are_refused(output, tmp_path):
    folder = output / "checkpoint"
    for path in (folder / "notes.txt", folder / "step-5" / "notes.txt", folder / "step-05", folder / "step-0"):
        path.write_text("")
        with pytest.raises(UserError, match="nothing that a run saves; remove it"):
            check_states(folder)
        path.unlink()
    (folder / "step-3" / "state.json").rename(tmp_path / "state.json")
    (folder / "step-3" / "state.json").symlink_to(tmp_path / "state.json")
    check_states(folder)  # of the newest
    damage_empty(folder / "step-5" / "state.json")
    with pytest.raises(UserError, match=r"state\.json is a link"):
        check_states(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for check in (Run(output).resume, lambda: check_states(folder)):
        with pytest.raises(UserError, match="checkpoint is a link"):
            check()


def test_a_state_of_another_run_is_refused(output):
    message = r"cannot go on: its learning_rate was 0\.01 and is now 0\.5; repeat the first command, or remove"
    with pytest.raises(UserError, match=message):
        Run(output, {**RUN, "learning_rate": 0.5}).resume()


def test_a_full_disk_leaves_the_state_before(output, monkeypatch):
    run = Run(output).resume().go(6)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"No space left on device; put that right, and repeat .* with --resume"):
            run.checkpoints.save(run.progress)
    assert sorted(path.name for path in (output / "checkpoint").iterdir()) == ["step-3", "step-5"]
    assert Run(output).resume().progress.step == 5
