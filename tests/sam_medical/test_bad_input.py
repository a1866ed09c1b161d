"""Bad input: each error is one line that names the option, key or file, with exit status 2."""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import SamModel

from sam_medical.adapters.adapter import load_adapter, save_adapter
from sam_medical.adapters.building import build_model
from sam_medical.adapters.task import Task, read_task, write_task
from sam_medical.cli import compare, evaluate, predict, train
from sam_medical.common.errors import UserError
from sam_medical.comparison import run as comparison_run
from sam_medical.evaluation import scoring, segmenting
from sam_medical.models.sam import load_sam_model
from sam_medical.models.sam_checkpoint import sam_model_from_checkpoint
from sam_medical.models.text import encode_labels
from sam_medical.options.commands import CompareOptions, EvaluateOptions, PredictOptions, TrainOptions
from sam_medical.options.parsing import parse_options
from sam_medical.training import run as training_run

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

NUMBERS = [
    "-1",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1" + "0" * 30,
    "9" * 5000,
    "",
    " ",
    "x",
    "1,2",
    "[1]",
    "½",
    "0x10",
]
TEXTS = ["", " ", "x" * 5000, "a\0b", "\t"]
LISTS = [[""], ["x" * 5000], ["a\0"], ["a", "a"]]


def of_one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 2000
    return message


def type_of(field):
    return str(field.type).removesuffix(" | None")


def bad_values(field):
    """Returns invalid values for a field's type. For free text, they are invalid as any text."""
    kind = type_of(field)
    if kind in ("int", "float"):
        return [value for value in NUMBERS if not (kind == "float" and value in ("0.5",))]
    if kind == "bool":
        return ["maybe", "2", "", "nan"]
    if kind == "list[str]":
        return LISTS
    return TEXTS


def cases():
    for options_type in (TrainOptions, CompareOptions, EvaluateOptions, PredictOptions):
        for field in fields(options_type):
            for value in bad_values(field):
                yield options_type, field, value


def needed(options_type, field):
    """Returns the required flags of a command, except for the tested one."""
    names = {EvaluateOptions: ["adapter"], PredictOptions: ["adapter", "images", "output"]}.get(options_type, [])
    return [part for name in names if name != field.name for part in (f"--{name}", "x")]


def test_every_bad_value_of_every_option_is_named(tmp_path):
    tried = 0
    for options_type, field, value in cases():
        if value == "" and field.default == "":
            continue
        values = value if isinstance(value, list) else [value]
        flag = f"--{field.name}"
        arguments = [flag, *values] if isinstance(value, list) else [f"{flag}={value}"]
        with pytest.raises(UserError) as error:
            parse_options(options_type, [*needed(options_type, field), *arguments])
        assert field.name in of_one_line(error), (field.name, value)
        tried += 1
    assert tried > 400


def test_every_bad_value_in_yaml_is_named(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "options.yaml"
    nested = [{"a": 1}, [[1]], [{"a": 1}], [None], {}, [[[[]]]]]
    for options_type, field, value in draw.sample(list(cases()), 150):
        for content in (value, draw.choice(nested)):
            if content == "" and field.default in ("", MISSING):
                continue
            path.write_text(json.dumps({field.name: content}))
            with pytest.raises(UserError) as error:
                parse_options(options_type, [*needed(options_type, field), "--config", str(path)])
            assert field.name in of_one_line(error)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[" * 20_000,
        b"{a: " * 5_000,
        BOMB.encode(),
        b"a: &a {x: 1}\nb: {<<: [*a, *a]}",
        b"steps: 2020-99-99",
        b"steps: !!python/object/apply:os.system ['true']",
        b"steps: !!binary x",
        b"? [1, 2]\n: 3",
        b"? {a: b}\n: 3",
        b"1: 2",
        b"steps: " + b"9" * 10_000,
        b"steps: 1\n\tx",
        b"\0",
        b"x" * 2**21,
        b"- 1",
        b"just text",
        b"steps: .nan",
        b"steps: .inf",
        b"--steps: 3",
        b"labels: ['--steps', '5']",
    ],
)
def test_every_bad_file_of_options_is_named(content, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"options\.yaml") as error:
        parse_options(TrainOptions, ["--config", str(path)])
    of_one_line(error)


def test_a_configuration_that_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), "/dev/zero"):
        with pytest.raises(UserError) as error:
            parse_options(TrainOptions, ["--config", str(path)])
        of_one_line(error)


def test_home_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.yaml").write_text("data_root: ~/data\nbackbone: ~/sam.pth\n")
    options = parse_options(TrainOptions, ["--config", "~/options.yaml", "--output-dir", "~/run"])
    assert (options.data_root, options.backbone, options.output_dir) == tuple(
        str(tmp_path / name) for name in ("data", "sam.pth", "run")
    )
    arguments = ["--adapter", "~/a", "--csv", "~/b", "--scores", "~/c", "--overlays", "~/d"]
    options = parse_options(EvaluateOptions, arguments)
    assert {options.adapter, options.csv, options.scores, options.overlays} == {str(tmp_path / n) for n in "abcd"}


PLACES = {
    "below a file": "file/x",
    "a file": "file",
    "too long a name": "x" * 300,
    "too long": "/".join(["x" * 200] * 30),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(place, tmp_path, run, refused, monkeypatch):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / PLACES[place]
    for module in (training_run, scoring, segmenting, comparison_run):
        for name in ("open_splits", "open_dataset", "load_adapter", "sources_to_segment", "Plan"):
            monkeypatch.setattr(module, name, None, raising=False)  # which would be called next
    with refused("output_dir"):
        run(train, output_dir=path)
    with refused("output_dir"):
        run(compare, output_dir=path)
    with refused("output"):
        run(predict, adapter="x", images="x", output=path)
    for name in ("output", "csv", "markdown", "scores", "overlays"):
        if place != "a file" or name == "overlays":
            with refused(name):
                run(evaluate, adapter="x", **{name: path})
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["/dev/null", "/proc/nothing/x"])
def test_a_run_s_folder_is_no_device(name, run, refused):
    with refused("output_dir is '/"):
        run(train, output_dir=name)


def test_commands_end_with_status_two_and_one_line_on_stderr(tmp_path):
    draw = random.Random(1)
    script_of = {
        TrainOptions: "train.py",
        CompareOptions: "compare.py",
        EvaluateOptions: "evaluate.py",
        PredictOptions: "predict.py",
    }
    for options_type, field, value in draw.sample(list(cases()), 2):
        values = value if isinstance(value, list) else [value]
        if any("\0" in text for text in values) or (value == "" and field.default == ""):
            continue
        command = [sys.executable, SCRIPTS / script_of[options_type], *needed(options_type, field)]
        process = subprocess.run([*command, f"--{field.name}", *values], capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 2 and not list(tmp_path.iterdir())
        (line,) = process.stderr.splitlines()
        assert re.match(r"error: ", line) and field.name in line and not process.stdout


@pytest.fixture(scope="module")
def adapter(tiny_sam_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    folder.mkdir()
    text = torch.randn(1, 5)
    model, task = build_model(Task("glas", ("glands",), str(tiny_sam_folder), 32, "minilm"), text)
    save_adapter(model, text, task, folder)
    return folder


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_loop(path):
    path.unlink()
    path.symlink_to(path)


def a_link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def text_of_another_kind(path):
    path.write_bytes(b"\xff" * 100)


DAMAGES = [missing, empty, truncated, a_folder, a_loop, a_link_to_nothing, text_of_another_kind]
FILES = ["adapter_model.safetensors", "adapter_config.json", "text_embeddings.safetensors", "task.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_adapter_is_named(name, damage, adapter, tmp_path, run, refused):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    damage(folder / name)
    with refused(re.escape(name)):
        run(evaluate, adapter=folder)


BAD_JSON = [None, True, -1, 0, 10**30, 1e300, "", "x", "x" * 10_000, [], [None], {}, {"a": None}, [[[]]], "\0", "\n"]


@pytest.mark.parametrize("name", ["task.json", "adapter_config.json"])
def test_every_bad_value_of_an_adapter_s_json_is_refused_or_means_nothing(name, adapter, tmp_path):
    """With no digests, as from before there were any; what is accepted gives the same model."""
    draw = random.Random(0)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({k: v for k, v in task.items() if k not in ("files", "digest")}))
    content = json.loads((folder / name).read_text())
    expected = {key: value.clone() for key, value in load_adapter(folder)[0].state_dict().items()}
    used = [key for key in expected if "original_module" not in key]  # which is as random as ever
    for key in content:
        without = {k: v for k, v in content.items() if k != key}
        values = [value for value in BAD_JSON if key not in ("backbone", "dataset") or not isinstance(value, str)]
        for changed in [without, *({**content, key: value} for value in draw.sample(values, 1))]:
            (folder / name).write_text(json.dumps(changed))
            try:
                model, _ = load_adapter(folder)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            state = model.state_dict()
            assert state.keys() == expected.keys()
            assert [k for k in used if not torch.equal(state[k], expected[k])] == [], (key, changed.get(key))


def test_a_task_that_was_rewritten_whole_still_holds_what_a_task_can(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for labels in (("glands", "glands"), ("CON",), ("../x",)):
        content = json.loads((folder / "task.json").read_text())
        plain = {k: v for k, v in content.items() if k not in ("files", "digest")}
        write_task(Task(**{**plain, "labels": labels}), folder)
        with pytest.raises(UserError, match=r"task\.json has the label"):
            load_adapter(folder)


def test_a_task_has_a_fold_only_where_the_dataset_has_folds(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    assert "fold" not in json.loads((folder / "task.json").read_text())
    task = read_task(folder)
    write_task(replace(task, dataset="abdominal-us-real", fold=2), folder)
    assert read_task(folder) == replace(task, dataset="abdominal-us-real", fold=2)
    for fold in (0, 10**5, True, "2", 1.5):
        write_task(replace(task, fold=fold), folder)
        with pytest.raises(UserError, match=r"task\.json: fold is .*, but it must be a whole number from 1 to 10000"):
            read_task(folder)


def test_a_method_that_only_a_file_names_is_not_imported(adapter, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "harm.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.chdir(tmp_path)
    content = json.loads((folder / "task.json").read_text())
    plain = {key: value for key, value in content.items() if key not in ("files", "digest")}
    (folder / "task.json").write_text(json.dumps({**plain, "method": "harm:METHOD"}))
    with pytest.raises(UserError, match=r"'harm:METHOD' is not part of this package.* give --extensions harm"):
        read_task(folder)


def test_a_damaged_base_model_is_refused_in_one_line(tiny_sam_folder, tmp_path):
    weights = (tiny_sam_folder / "model.safetensors").read_bytes()
    for content in (b"", weights[:1000], weights[:-1000], b"\xff" * 1000):
        folder = shutil.copytree(tiny_sam_folder, tmp_path / "sam", dirs_exist_ok=True)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(folder))) as error:
            load_sam_model(str(folder))
        of_one_line(error)
    (folder / "model.safetensors").unlink()
    torch.save(SamModel.from_pretrained(tiny_sam_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=re.escape(str(folder))) as error:
        load_sam_model(str(folder))
    of_one_line(error)
    for content in (
        "",
        "[]",
        '{"model_type": "sam", "vision_config": 3}',
        '{"model_type": "sam", "vision_config": []}',
    ):
        folder = shutil.copytree(tiny_sam_folder, tmp_path / "sam", dirs_exist_ok=True)
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=re.escape(str(folder))) as error:
            load_sam_model(str(folder))
        of_one_line(error)


def test_an_incomplete_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "sam.pth"
    positions = {"image_encoder.pos_embed": torch.zeros(1, 4, 4, 8)}
    for content in (positions, {"image_encoder.pos_embed": torch.zeros(3)}, {"model": {}}, {}, [], 3, None):
        torch.save(content, path)
        with pytest.raises(UserError, match=re.escape(str(path))) as error:
            sam_model_from_checkpoint(path)
        of_one_line(error)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        sam_model_from_checkpoint(path)
    of_one_line(error)


def test_a_damaged_text_encoder_is_refused_in_one_line(tiny_clip_folder, tmp_path):
    draw = random.Random(0)
    for path in sorted(tiny_clip_folder.iterdir()):
        for damage in draw.sample([empty, truncated, a_folder, text_of_another_kind], 2):
            folder = tmp_path / f"{path.name}-{damage.__name__}"
            shutil.copytree(tiny_clip_folder, folder)
            damage(folder / path.name)
            if path.name in ("tokenizer_config.json", "special_tokens_map.json") and damage is a_folder:
                continue  # which the tokenizer does without
            with pytest.raises(UserError, match=re.escape(str(folder))) as error:
                encode_labels(str(folder), ["a"])
            of_one_line(error)
    folder = shutil.copytree(tiny_clip_folder, tmp_path / "nan")
    tensors = {"text_model.embeddings.token_embedding.weight": torch.full((54, 16), float("nan"))}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(str(folder))):
        encode_labels(str(folder), ["a"])


def test_images_and_labels_that_cannot_be_read_are_named(run, refused, glas_folder, tmp_path):
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    for content in ("", "[]", '{"a": "b"}', "[" * 100_000, '{"CON": 1}', '{"a": 1, "A": 2}', "\udcff", '{"a": 1e999}'):
        (own / "labels.json").write_text(content, errors="surrogateescape")
        with refused(r"labels\.json"):
            run(train, dataset="own", data_root=own, output_dir=tmp_path / "run")
    Path(glas_folder / "Warwick_QU_Dataset" / "Grade.csv").write_bytes(b"\xff\0,\n" * 3)
    Path(glas_folder / "Warwick_QU_Dataset" / "train_1.bmp").write_bytes(b"BM" + b"\xff" * 200)
    with refused(r"train_1\.bmp|Grade\.csv|data"):
        run(train, dataset="glas", data_root=glas_folder, output_dir=tmp_path / "run", text_encoder="minilm")
    assert not (tmp_path / "run").exists()
