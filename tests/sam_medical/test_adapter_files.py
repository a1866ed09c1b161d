"""Adapter folders: changed, damaged or malicious files are rejected."""

import json
import pickle
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sam_medical.adapters.adapter import load_adapter, save_adapter
from sam_medical.adapters.building import build_model
from sam_medical.adapters.task import Task, read_task, write_task
from sam_medical.cli import evaluate
from sam_medical.common.errors import UserError
from sam_medical.data.base import require_label_names
from sam_medical.models.sam_checkpoint import read_checkpoint

LABELS = ("liver", "Gallbladder", "σπλήν")


def saved(folder, backbone, method, **changes):
    torch.manual_seed(0)
    folder.mkdir()
    text = torch.randn(len(LABELS), 5)
    task = Task("own", LABELS, str(backbone), 32, "minilm", method=method, **changes)
    model, task = build_model(task, text if method != "samed" else None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1, 0.1)
    save_adapter(model, text if method != "samed" else None, task, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_sam_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {method: saved(root / method, tiny_sam_folder, method) for method in ("s-sam", "lora", "samed")}


@pytest.fixture(params=["s-sam", "samed"])
def folder(request, adapters, tmp_path):
    return shutil.copytree(adapters[request.param], tmp_path / "adapter")


@pytest.fixture
def ssam(adapters, tmp_path):
    return shutil.copytree(adapters["s-sam"], tmp_path / "adapter")


def rewrite(folder, name, content):
    """Replaces a file, and updates the digests in task.json as an attacker would."""
    if isinstance(content, dict) and name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        (folder / name).write_text(json.dumps(content))
    write_task(read_task_unchecked(folder), folder)


def read_task_unchecked(folder):
    content = json.loads((folder / "task.json").read_text())
    return Task(**{key: value for key, value in content.items() if key not in ("files", "digest")})


@pytest.mark.parametrize("method", ["s-sam", "lora", "samed"])
def test_an_adapter_comes_back(method, adapters):
    model, task = load_adapter(adapters[method])
    assert task.labels == LABELS and not model.training
    sizes = {path.name: path.stat().st_mode & 0o777 for path in adapters[method].iterdir()}
    content = json.loads((adapters[method] / "task.json").read_text())
    assert set(content["files"]) == sizes.keys() - {"task.json", "README.md"} and len(content["digest"]) == 64


def test_one_from_before_there_were_digests_is_read(ssam):
    content = json.loads((ssam / "task.json").read_text())
    del content["files"], content["digest"]
    (ssam / "task.json").write_text(json.dumps(content))
    assert load_adapter(ssam)[1].labels == LABELS


def test_swapped_labels_and_files_are_noticed(ssam, adapters, tiny_sam_folder, tmp_path):
    content = json.loads((ssam / "task.json").read_text())
    content["labels"].reverse()
    (ssam / "task.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"task\.json is damaged: it is not what was written"):
        read_task(ssam)
    content["labels"].reverse()
    (ssam / "task.json").write_text(json.dumps(content))
    read_task(ssam)
    tensors = load_file(ssam / "text_embeddings.safetensors")
    save_file({"text_embeddings": tensors["text_embeddings"].flip(0)}, ssam / "text_embeddings.safetensors")
    with pytest.raises(UserError, match=r"text_embeddings\.safetensors is damaged or another adapter's"):
        load_adapter(ssam)


def test_every_flipped_bit_is_noticed(folder):
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(15 if path.name != "README.md" else 0):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=str(path.parent)):
                load_adapter(folder)
        path.write_bytes(content)
    load_adapter(folder)


def spoil(kind, tensors):
    name = sorted(tensors)[0]
    tensor = tensors[name]
    wrong = {
        "nan": lambda: {**tensors, name: torch.full_like(tensor, float("nan"))},
        "infinity": lambda: {**tensors, name: torch.full_like(tensor, float("inf"))},
        "integers": lambda: {**tensors, name: torch.ones_like(tensor, dtype=torch.int64)},
        "booleans": lambda: {**tensors, name: torch.ones_like(tensor, dtype=torch.bool)},
        "another shape": lambda: {**tensors, name: torch.ones(3, 4, 5)},
        "no values": lambda: {**tensors, name: torch.ones(0)},
        "one missing": lambda: {key: value for key, value in tensors.items() if key != name},
        "none": dict,
        "one too many": lambda: {**tensors, "base_model.model.x.base_layer.weight": torch.ones(2)},
    }
    return wrong[kind]()


KINDS = [
    "nan",
    "infinity",
    "integers",
    "booleans",
    "another shape",
    "no values",
    "one missing",
    "one too many",
    "none",
]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_cannot_be_are_refused_by_name(kind, folder):
    for name in ("adapter_model.safetensors", "trained.safetensors", "text_embeddings.safetensors"):
        if (folder / name).exists():
            tensors = load_file(folder / name)
            rewrite(folder, name, spoil(kind, tensors))
            with pytest.raises(UserError) as error:
                load_adapter(folder)
            assert str(folder) in str(error.value) and "\n" not in str(error.value)
            rewrite(folder, name, tensors)
    load_adapter(folder)


def test_an_additional_tensor_does_not_overwrite_the_base(ssam):
    tensors = load_file(ssam / "adapter_model.safetensors")
    name = next(key for key in tensors if key.endswith("svd_scale_shift_a.weight"))
    base = name.replace("svd_scale_shift_a.weight", "base_layer.weight")
    rewrite(ssam, "adapter_model.safetensors", {**tensors, base: torch.ones(2)})
    with pytest.raises(UserError, match=r"base_layer\.weight"):
        load_adapter(ssam)


CATASTROPHE = "image_encoder(.*.*.*.*.*.*.*.*)*x"


@pytest.mark.parametrize(
    "key, value",
    [
        ("target_modules", CATASTROPHE),
        ("exclude_modules", CATASTROPHE),
        ("rank_pattern", {CATASTROPHE: 1}),
        ("target_modules", None),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "LORA"),
        ("modules_to_save", ["mask_decoder"]),
        ("bias", "all"),
    ],
)
def test_a_configuration_is_the_one_that_the_task_has(key, value, ssam):
    config = json.loads((ssam / "adapter_config.json").read_text())
    rewrite(ssam, "adapter_config.json", {**config, key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*, and for this task it is"):
        load_adapter(ssam)


@pytest.mark.parametrize("method", ["s-sam", "lora", "salt"])
def test_an_expression_that_takes_too_long_is_ended(method, adapters, tiny_sam_folder, monkeypatch):
    monkeypatch.setattr("sam_medical.common.expressions.SECONDS", 1)
    task = replace(read_task(adapters["s-sam"]), method=method, target_modules=r"(\w+\.?)+x")
    with pytest.raises(UserError, match="takes more than 1 seconds to match; give a simpler one"):
        build_model(task, torch.ones(len(LABELS), 5))


BAD_TASKS = [
    ("labels", []),
    ("labels", "liver"),
    ("labels", ["liver", 3]),
    ("labels", None),
    ("image_size", 0),
    ("image_size", 10**9),
    ("image_size", 32.0),
    ("image_size", True),
    ("image_size", "32"),
    ("dataset", None),
    ("backbone", ""),
    ("backbone", "a\0b"),
    ("backbone_digest", "xyz"),
    ("method", "magic"),
    ("method", ["s-sam"]),
    ("target_modules", ""),
    ("target_modules", 5),
    ("text_encoder", {}),
]


@pytest.mark.parametrize("key, value", BAD_TASKS)
def test_each_value_of_a_task_is_looked_at(key, value, ssam):
    content = json.loads((ssam / "task.json").read_text())
    del content["files"], content["digest"]
    (ssam / "task.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(UserError, match=rf"task\.json: {key} is .*, but it must be"):
        read_task(ssam)
    for keys, message in (
        ({k: v for k, v in content.items() if k != "labels"}, "lacks the key 'labels'"),
        ({**content, "code": "import os"}, "has the unknown key 'code'"),
    ):
        (ssam / "task.json").write_text(json.dumps(keys))
        with pytest.raises(UserError, match=message):
            read_task(ssam)


NO_FOLDERS = ["", " ", ".", "..", "a/b", "a\\b", "../x", "a\nb", "a\0", "CON", "nul.txt", "com1", "LPT³", "x.", "x "]
NO_FOLDERS += [" x", "a:b", "a*b", "a|b", '"', "é" * 128, "\u202eabc"]


@pytest.mark.parametrize("label", NO_FOLDERS)
def test_a_label_is_a_folder_s_name_on_every_system(label, tmp_path):
    with pytest.raises(UserError, match="its name is also a folder name, and this one "):
        require_label_names([label], tmp_path)


def test_two_labels_are_two_folders_on_every_system(tmp_path):
    for labels in (("Liver", "liver"), ("é", "e\u0301"), ("a", "a")):
        with pytest.raises(UserError, match="which are the same folder on some systems"):
            require_label_names(labels, tmp_path)
    require_label_names(["liver", "σπλήν", "コン", "com", "con1", "a.b"], tmp_path)


def test_a_run_that_was_killed_between_two_renames_is_evaluated(run, adapters, tmp_path, glas_folder, refused):
    shutil.copytree(adapters["s-sam"], tmp_path / ".old.adapter")
    with refused("own has no split|glas has no label|there is no folder|own needs --data-root"):
        run(evaluate, adapter=tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter")[1].labels == LABELS


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_checkpoint_that_would_run_code_is_refused(protocol, tmp_path):
    path, harm = tmp_path / "sam.pth", tmp_path / "harm"
    path.write_bytes(pickle.dumps({"model": Payload(harm)}, protocol))
    with pytest.raises(UserError, match=r"sam\.pth is not a checkpoint that torch can read"):
        read_checkpoint(path)
    torch.save({"image_encoder.pos_embed": Payload(harm)}, path)
    with pytest.raises(UserError, match=r"sam\.pth is not a checkpoint that torch can read"):
        read_checkpoint(path)
    assert not harm.exists()
