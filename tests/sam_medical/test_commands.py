"""train, evaluate and predict end to end, on a miniature of GlaS with small random models."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sam_medical.cli import evaluate, predict, train
from sam_medical.data import DATASETS
from sam_medical.evaluation import scoring
from sam_medical.evaluation.metrics import read_scores
from sam_medical.methods import METHODS
from sam_medical.training.progress import Progress
from sam_medical.training.record import RunRecord

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

STEPS = 6


@pytest.fixture
def options(glas_folder, tiny_sam_folder, tiny_clip_folder, tmp_path):
    return {
        "dataset": "glas",
        "data_root": glas_folder,
        "output_dir": tmp_path / "run",
        "backbone": tiny_sam_folder,
        "text_encoder": tiny_clip_folder,
        "image_size": 32,
        "steps": STEPS,
        "batch_size": 2,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "validate_every": 4,
        "augmentation": "any-orientation",
    }


def read_json(path):
    return json.loads(path.read_text())


def test_train_leaves_what_evaluate_and_predict_need(run, options, tmp_path, capsys, refused):
    run(train, **options)
    output = tmp_path / "run"
    metrics = read_json(output / "metrics.json")
    scores = metrics["test"]["labels"]["glands"]
    assert {"dice", "dice_present", "dice_pooled"} <= scores.keys() and metrics["test"]["mean_dice"] == scores["dice"]
    assert metrics["seconds"] > 0
    table = capsys.readouterr().out
    assert f"glands  {scores['dice']:.4f}" in table and str(output / "overlays") in table

    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == metrics["trainable_parameters"]
    scales = torch.cat([tensor for name, tensor in tensors.items() if name.endswith("svd_scale_shift_a.weight")])
    assert (scales != 0).float().mean() > 0.9
    for picture in (output / "curves.png", output / "overlays" / "testA_1.png", output / "overlays" / "testA_2.png"):
        assert min(Image.open(picture).size) > 100
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter",
        "curves.png",
        "history.json",
        "metrics.json",
        "overlays",
        "scores.csv",
    ]
    assert "import svdtune" in (output / "adapter" / "README.md").read_text()
    with refused("holds a finished run; replace it with --overwrite"):
        run(train, **options)

    adapter = output / "adapter"
    run(evaluate, adapter=adapter, data_root=options["data_root"], split="test", output=tmp_path / "again.json")
    assert read_json(tmp_path / "again.json")["test"]["mean_dice"] == pytest.approx(
        metrics["test"]["mean_dice"], abs=1e-4
    )

    # In a process of its own, where nothing has made the method known to PEFT.
    command = [sys.executable, SCRIPTS / "evaluate.py", "--adapter", adapter, "--data_root", options["data_root"]]
    subprocess.run([*command, "--output", tmp_path / "apart.json"], check=True, capture_output=True)
    assert read_json(tmp_path / "apart.json") == read_json(tmp_path / "again.json")

    images = options["data_root"] / "Warwick_QU_Dataset"
    run(predict, adapter=adapter, images=images, output=tmp_path / "masks")
    mask = Image.open(tmp_path / "masks" / "glands" / "testA_1.png")
    assert mask.size == Image.open(images / "testA_1.bmp").size and set(np.unique(mask)) <= {0, 255}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, options, tmp_path, monkeypatch, capsys, refused):
    run(train, **options)

    add_step = Progress.add_step

    def interrupt(progress, loss):
        add_step(progress, loss)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    interrupted = {**options, "output_dir": tmp_path / "interrupted"}
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add_step", interrupt)
        with pytest.raises(SystemExit) as stop:
            run(train, **interrupted)
    assert stop.value.code == 130
    assert "Stopped after step 3; repeat the command with --resume" in capsys.readouterr().out

    with refused("holds an interrupted run; go on with --resume"):
        run(train, **interrupted)
    with refused(r"cannot go on: its learning_rate was 0\.01 and is now 0\.5"):
        run(train, **{**interrupted, "learning_rate": 0.5}, resume=True)
    stray = options["data_root"] / "Warwick_QU_Dataset" / "train_1_anno.bmp"
    mask = Image.open(stray).copy()
    Image.new("L", mask.size, 1).save(stray)
    with refused("cannot go on: its train images was"):
        run(train, **interrupted, resume=True)
    mask.save(stray)
    run(train, **interrupted, resume=True)
    assert f"Going on after step 3 of {STEPS}" in capsys.readouterr().out

    whole, resumed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "interrupted")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_disk_that_fills_ends_the_run_in_one_line_and_its_state_resumes(run, options, tmp_path, refused):
    run(train, **options)
    full = {**options, "output_dir": tmp_path / "full"}
    allowed = {"step-4": False}

    def fsync(descriptor):
        allowed["step-4"] |= (tmp_path / "full" / "checkpoint" / "step-4").exists()
        if allowed["step-4"] and not (tmp_path / "full" / "history.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with refused("No space left on device; put that right, and repeat the command with --resume to go on"):
            run(train, **full)
    left = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert left == ["adapter", "checkpoint"]
    run(train, **full, resume=True)
    losses = [read_json(tmp_path / name / "history.json")["losses"] for name in ("run", "full")]
    assert losses[0] == losses[1]

    with pytest.MonkeyPatch.context() as patch, refused(r"MiB free, and the run needs \d+ MiB; make room"):
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        run(train, **{**options, "output_dir": tmp_path / "none"})


def test_half_precision_trains_and_is_scored_in_full(run, options, tmp_path):
    run(train, **options, mixed_precision="bf16")
    output = tmp_path / "run"
    arguments = {"adapter": output / "adapter", "data_root": options["data_root"], "output": tmp_path / "again.json"}
    run(evaluate, **arguments, overlays=tmp_path / "pictures")
    assert read_json(tmp_path / "again.json")["test"] == read_json(output / "metrics.json")["test"]
    run(train, **{**options, "output_dir": tmp_path / "single"})
    half, single = (read_json(tmp_path / name / "history.json")["losses"] for name in ("run", "single"))
    assert half != pytest.approx(single, rel=1e-4) and half == pytest.approx(single, rel=0.1)
    assert len(list((tmp_path / "pictures").glob("testA_*.png"))) == 2


def test_gradient_accumulation_makes_one_update_of_several_batches(run, options, tmp_path):
    run(
        train, **{**options, "batch_size": 1, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "accumulated"}
    )
    run(train, **options)
    accumulated, whole = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("accumulated", "run")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(accumulated[name], tensor, atol=2e-3, rtol=0)


def test_mistakes_end_in_one_line_before_training_starts(run, options, tmp_path, refused):
    folder = options["data_root"] / "Warwick_QU_Dataset"
    for changes, message in (
        (
            {"target_modules": "nothing.*"},
            "error: target_modules 'nothing.*': matches no layer; their names are like image",
        ),
        ({"target_modules": "(qkv"}, "error: target_modules '(qkv': missing )"),
        ({"target_modules": ".*layer_norm1"}, "it is SamLayerNorm, and none of Linear"),
        ({"labels": "tumor"}, "error: glas has no label 'tumor'; choose from glands"),
        ({"image_size": 40}, "error: image_size 40 does not fit"),
        ({"backbone": tmp_path}, "holds a model of type None, and not one of lite-medsam, sam"),
        (
            {"dataset": "brain-mri"},
            "brain-mri takes no --data-root, since nilearn carries it; give --dataset own",
        ),
        ({"seed": -1}, "error: seed is -1, but it must not be negative"),
        ({"stepps": 3}, "error: unrecognized arguments: --stepps 3"),
        ({"data_root": tmp_path / "nowhere"}, "error: there is no folder"),
        ({"data_root": tmp_path}, "holds no images of the split train"),
    ):
        with refused(re.escape(message)):
            run(train, **{**options, **changes})
    (folder / "train_2_anno.bmp").rename(folder / "lost.bmp")
    with refused(r"error: .*train_2\.bmp has no mask"):
        run(train, **options)
    (folder / "lost.bmp").rename(folder / "train_2_anno.bmp")
    (folder / "train_3.bmp").write_bytes(b"BM")
    with refused(r"error: .*train_3\.bmp cannot be read as an image"):
        run(train, **options)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_refused_by_another_base_and_when_damaged(run, options, tmp_path, tiny_sam_config, refused):
    from transformers import SamModel

    run(train, **options)
    adapter = tmp_path / "run" / "adapter"
    arguments = {"adapter": adapter, "data_root": options["data_root"], "output": tmp_path / "metrics.json"}

    torch.manual_seed(1)
    SamModel(tiny_sam_config).save_pretrained(tmp_path / "other")
    with refused("the adapter belongs to another base model"):
        run(evaluate, **arguments, backbone=tmp_path / "other")

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.lin1" not in name}, weights)
    with refused(
        r"adapter_model\.safetensors is damaged or another adapter's: it is not what task\.json was written with"
    ):
        run(evaluate, **arguments)
    weights.write_bytes(weights.read_bytes()[:1000])
    with refused(r"adapter_model\.safetensors is damaged"):
        run(evaluate, **arguments)
    weights.unlink()
    with refused(r"holds no adapter_model\.safetensors; give the folder"):
        run(evaluate, **arguments)


def test_a_run_writes_its_whole_truth(run, options, tmp_path):
    run(train, **options)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["environment"]["torch"] == torch.__version__ and metrics["environment"]["svdtune"]
    assert metrics["options"]["seed"] == 0 and metrics["options"]["method"] == "s-sam"
    for place in (tmp_path, options["data_root"], Path.home(), SCRIPTS):
        assert str(place) not in (tmp_path / "run" / "metrics.json").read_text()
    record = RunRecord.read(tmp_path / "run" / "metrics.json")
    assert record.options == metrics["options"] and record.best_dice == metrics["validation"]["best_dice"]
    assert {"data_root", "output_dir", "resume", "overwrite"}.isdisjoint(record.options)
    assert [step for step, _ in metrics["history"]["validations"]] == [4, 6]
    assert read_json(tmp_path / "run" / "history.json") == metrics["history"]
    glands = [scores["glands"]["dice"] for scores in metrics["history"]["label_scores"]]
    assert glands == [pytest.approx(dice) for _, dice in metrics["history"]["validations"]]
    assert len(metrics["history"]["losses"]) == STEPS and metrics["peak_memory_bytes"] > 1e8
    images = {split: values["images"] for split, values in metrics["data"].items()}
    assert images == {"train": 6, "validation": 1, "test": 2}

    mask = options["data_root"] / "Warwick_QU_Dataset" / "testA_1_anno.bmp"
    changed = np.array(Image.open(mask))
    changed[0, 0] = 1
    Image.fromarray(changed).save(mask)
    run(train, **options, overwrite=True)
    again = read_json(tmp_path / "run" / "metrics.json")["data"]
    assert [again[split] == values for split, values in metrics["data"].items()] == [True, True, False]


def test_a_tracker_is_told_of_every_step(run, options, tmp_path, refused):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with refused("report_to 'nobody' is not a tracker that accelerate finds here"):
        run(train, **options, report_to="nobody")
    run(train, **options, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "ssam")).Reload()
    history = read_json(tmp_path / "run" / "metrics.json")["history"]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(history["losses"])
    told = [(event.step, pytest.approx(event.value)) for event in events.Scalars("validation Dice")]
    assert told == [(step, dice) for step, dice in history["validations"]]


def spy_on(option, monkeypatch):
    """Gives a function that says whether what the option is for has been done since."""
    if option == "compile":
        from torch._dynamo.utils import counters

        before = counters["frames"]["ok"]
        return lambda: counters["frames"]["ok"] > before
    calls = []

    def checkpoint(*arguments, **keywords):
        calls.append(arguments)
        return torch.utils.checkpoint.checkpoint(*arguments, **keywords)

    monkeypatch.setattr("sam_medical.models.backbone.checkpoint", checkpoint)
    return lambda: len(calls) >= STEPS


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_options_for_memory_and_speed_do_not_change_what_is_learned(option, run, options, tmp_path, monkeypatch):
    run(train, **options)
    did_it = spy_on(option, monkeypatch)
    run(train, **{**options, "output_dir": tmp_path / option}, **{option: True})
    assert did_it()
    plain, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", option))
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
    dice = [read_json(tmp_path / name / "metrics.json")["test"]["mean_dice"] for name in ("run", option)]
    assert dice[0] == pytest.approx(dice[1], abs=0.01)


KILLED_AT_STEP_5 = """
import os, sys
from sam_medical.cli import train
from sam_medical.training.progress import Progress
from sam_medical.evaluation.metrics import read_scores
add_step = Progress.add_step
def die(progress, loss):
    add_step(progress, loss)
    if progress.step == 5:
        os.kill(os.getpid(), 9)
Progress.add_step = die
sys.argv[0] = "train"
train.main()
"""


@pytest.mark.parametrize("method", ["s-sam", "sono-sam"])
def test_a_killed_run_goes_on_from_its_last_validation_with_the_same_losses(method, run, options, tmp_path):
    """SonoSAM draws its points in training."""
    options["method"] = method
    run(train, **options)
    killed = {**options, "output_dir": tmp_path / "killed"}
    flags = [part for name, value in killed.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_5, *flags], cwd=SCRIPTS, capture_output=True)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "killed" / "checkpoint").exists()
    run(train, **killed, resume=True)
    histories = [read_json(tmp_path / name / "metrics.json")["history"] for name in ("run", "killed")]
    assert histories[1]["losses"] == pytest.approx(histories[0]["losses"], rel=1e-4)
    assert histories[1]["validations"] == [[step, pytest.approx(dice)] for step, dice in histories[0]["validations"]]


def test_evaluate_writes_tables_and_tests_a_difference(run, options, tmp_path, capsys, monkeypatch, refused):
    run(train, **options)
    run(train, **{**options, "output_dir": tmp_path / "other"}, method="zero-shot-text")
    arguments = {"adapter": tmp_path / "run" / "adapter", "data_root": options["data_root"]}
    names = {"output": "metrics.json", "csv": "table.csv", "markdown": "table.md", "scores": "scores.csv"}
    files = {option: tmp_path / name for option, name in names.items()}
    run(evaluate, **arguments, **files, against=tmp_path / "other" / "scores.csv")
    table, printed = files["markdown"].read_text(), capsys.readouterr().out
    dice = read_json(files["output"])["test"]["mean_dice"]
    assert f"| glands | {dice:.4f} |" in table
    assert files["csv"].read_text().splitlines()[1].startswith(f"glands,{dice:.4f},")
    rows = [score.dice for score in read_scores(files["scores"])]
    others = [score.dice for score in read_scores(tmp_path / "other" / "scores.csv")]
    assert np.mean(rows) == pytest.approx(dice)
    assert f"Dice {np.mean(rows) - np.mean(others):+.4f}" in printed and "p = " in printed
    for wrong, message in {
        "table.md": r"table\.md does not hold the scores of images; .* or what evaluate\.py --scores",
        "nowhere.csv": r"nowhere\.csv cannot be read; give a run's scores\.csv",
    }.items():
        with refused(message):
            run(evaluate, **arguments, against=tmp_path / wrong)

    def nothing_may_be_scored(*_, **__):
        raise AssertionError("it has begun to evaluate")

    monkeypatch.setattr(scoring, "evaluate", nothing_may_be_scored)
    first_row = "".join(files["scores"].read_text().splitlines(keepends=True)[:2])
    (tmp_path / "one.csv").write_text(first_row)
    with refused(r"one\.csv is of 1 images and of glands, this evaluation of 2 and of glands"):
        run(evaluate, **arguments, against=tmp_path / "one.csv")
    with refused(r"csv is '.*', but it must be a file, in a folder or one that can be made"):
        run(evaluate, **arguments, csv=tmp_path)
    with refused(r"output is '.*', but it must be a folder, or one that can be made"):
        run(predict, adapter=arguments["adapter"], images=tmp_path, output=files["csv"] / "masks")


def test_a_method_that_needs_an_expert_does_not_predict_by_itself(run, options, tmp_path, refused):
    run(train, **options, method="sono-sam")
    adapter = tmp_path / "run" / "adapter"
    with refused("SonoSAM needs a point in each label, which images alone do not give"):
        run(predict, adapter=adapter, images=options["data_root"] / "Warwick_QU_Dataset", output=tmp_path / "masks")


def test_a_loss_that_is_no_number_ends_the_run(run, options, monkeypatch, refused):
    monkeypatch.setattr(
        "sam_medical.training.losses.FocalDiceLoss.forward", lambda loss, logits, masks: logits.sum() * float("nan")
    )
    with refused(r"error: the loss of step 1 is nan; give a lower learning_rate than 0\.01"):
        run(train, **options)


def test_volumes_are_trained_on_and_segmented_where_they_lie_in_space(run, options, tmp_path):
    root, affine = tmp_path / "volumes", np.diag([2.0, 3.0, 4.0, 1.0])
    scan = np.random.default_rng(0).normal(0, 100, (24, 16, 3)).astype(np.float32)
    scan[4:12, 2:9] += 800
    scan[0, 0, 0] = np.nan
    for patient in range(10):
        for kind, values in {"images": scan, "masks": (scan > 400).astype(np.uint8)}.items():
            (root / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, affine), root / kind / f"patient{patient}.nii.gz")
    (root / "labels.json").write_text('{"lesion": 1}')
    run(train, **{**options, "dataset": "own", "data_root": root, "augmentation": "upright"})
    assert len(read_scores(tmp_path / "run" / "scores.csv")) == 2 * 3
    run(predict, adapter=tmp_path / "run" / "adapter", images=root / "images", output=tmp_path / "masks")
    masks = sorted((tmp_path / "masks" / "lesion").iterdir())
    assert [path.name for path in masks] == [f"patient{patient}.nii.gz" for patient in range(10)]
    mask = nibabel.load(masks[7])
    assert mask.shape == scan.shape and (mask.affine == affine).all()
    # What evaluation has counted in the slices of this patient, which is in the test.
    predicted = [score.predicted for score in read_scores(tmp_path / "run" / "scores.csv")][:3]
    assert np.asarray(mask.dataobj).sum((0, 1)).tolist() == predicted


EXTENSION = """
from dataclasses import replace

from sam_medical.data import DATASETS
from sam_medical.methods import METHODS

SLIM = replace(METHODS["s-sam"], title="Slim S-SAM")
DATASETS.register("clinic", type("Clinic", (DATASETS["glas"],), {}))
"""


def test_a_method_and_a_dataset_of_ones_own_go_through_every_command(run, options, tmp_path, monkeypatch, refused):
    (tmp_path / "my_extension.py").write_text(EXTENSION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("sam_medical.common.registry.EXTENSIONS", set())
    for registry in (DATASETS, METHODS):
        monkeypatch.setattr(registry, "_values", {**registry._values})
    own = {**options, "dataset": "clinic", "method": "my_extension:SLIM"}
    run(train, **own, extensions="my_extension")
    adapter = tmp_path / "run" / "adapter"
    assert read_json(adapter / "task.json")["method"] == "my_extension:SLIM"
    arguments = ["--adapter", adapter, "--data_root", options["data_root"], "--output", tmp_path / "scores.json"]
    command = [sys.executable, SCRIPTS / "evaluate.py", *arguments]
    # A process that has not imported the module does not import it because a file names it.
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode == 2 and "if you trust its code, give --extensions my_extension" in alone.stderr
    assert len([line for line in alone.stderr.splitlines() if line.startswith("error: ")]) == 1
    subprocess.run([*command, "--extensions", "my_extension"], check=True, capture_output=True)
    assert read_json(tmp_path / "scores.json")["test"] == read_json(tmp_path / "run" / "metrics.json")["test"]
    with refused("unknown dataset 'clinics'; choose from brain-mri, "):
        run(train, **{**options, "dataset": "clinics", "output_dir": tmp_path / "none"})
    sys.modules.pop("my_extension")
