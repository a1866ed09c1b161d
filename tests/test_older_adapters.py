"""Adapters of format versions 1 and 2, which contain A itself, still load, and are saved in the current format."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from svdtune import SVDScaleShiftConfig, hotswap_adapter
from svdtune.digests import digest_of_each


@pytest.fixture
def base():
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8))


@pytest.fixture
def model(base, train):
    config = SVDScaleShiftConfig(target_modules=["0", "2"], modules_to_save=["1"])
    return train(get_peft_model(copy.deepcopy(base), config))


def write_as_before(model, folder, version):
    """What version 1 or 2 of svdtune wrote."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = name.replace("svd_scale_shift_b.weight", "svd_scale_shift_shift")
        if name.endswith("svd_scale_shift_a.weight"):
            name, tensor = name.replace("svd_scale_shift_a.weight", "svd_scale_shift_scale"), 1 + tensor
        tensors[name] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["format_version"] = 2
    config["digests"] = {"adapter_config.json": config["digests"]["adapter_config.json"], **digest_of_each(tensors)}
    if version == 1:
        del config["digests"], config["format_version"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("version", [1, 2])
def test_it_loads_and_is_saved_as_one_of_today(version, model, base, tmp_path):
    write_as_before(model, tmp_path / "old", version)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old")
    x = torch.randn(5, 12)
    torch.testing.assert_close(loaded(x), model(x))

    loaded.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["format_version"] == 3
    again = PeftModel.from_pretrained(base, tmp_path / "new")
    assert torch.equal(again(x), loaded(x))


def test_it_takes_the_place_of_a_loaded_one(model, base, train, tmp_path):
    write_as_before(model, tmp_path / "old", 2)
    config = SVDScaleShiftConfig(target_modules=["0", "2"], modules_to_save=["1"])
    other, x = train(get_peft_model(copy.deepcopy(base), config)), torch.randn(5, 12)
    hotswap_adapter(other, str(tmp_path / "old"))
    torch.testing.assert_close(other(x), model(x))


def test_damage_is_noticed(model, base, tmp_path):
    write_as_before(model, tmp_path / "old", 2)
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="has changed"):
        PeftModel.from_pretrained(base, tmp_path / "old")
