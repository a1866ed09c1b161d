"""The method through the interfaces of PEFT and transformers."""

import copy
import importlib
import io
import json
import pickle

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import svdtune
from svdtune import SVDScaleShiftConfig, SVDScaleShiftModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


class Net(nn.Module):
    """A convolution and two linear layers to tune, a norm and a head to train whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 20)
        self.head = nn.Linear(20, 4)
        for layer in (self.conv, self.fc1, self.fc2, self.head):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    def forward(self, image):
        features = self.norm(self.conv(image).flatten(2).mean(-1))
        return self.head(self.fc2(self.fc1(features).tanh()).tanh())


TUNED = {"conv": 8, "fc1": 8, "fc2": 12}
WRAPPED = "base_model.model."


def config(**choices):
    return SVDScaleShiftConfig(**{"target_modules": list(TUNED), **choices})


def in_model(name, adapter_name="default"):
    """What a value of an adapter file is called in the model."""
    return name.replace(".weight", f".{adapter_name}.weight")


def adapter_of(layer_sizes):
    """Names and sizes of what an adapter file holds."""
    return {
        f"{WRAPPED}{layer}.svd_scale_shift_{vector}.weight": (size,)
        for layer, size in layer_sizes.items()
        for vector in ("a", "b")
    }


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def same_state(module, other):
    state, other_state = module.state_dict(), other.state_dict()
    return state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def base(dtype):
    return Net().to(dtype).eval()


@pytest.fixture
def image(dtype):
    return torch.randn(2, 3, 6, 6).to(dtype)


@pytest.fixture
def model(base, train):
    """The base model, copied and tuned."""
    return train(get_peft_model(copy.deepcopy(base), config())).eval()


@pytest.fixture
def tolerance(dtype):
    return {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]}


# What trains, and what is saved


def test_training_changes_the_adapter_and_nothing_else(base, image, dtype):
    model = get_peft_model(copy.deepcopy(base), config())
    assert trainable(model) == {in_model(name) for name in adapter_of(TUNED)}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(image).float(), torch.tensor([0, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert same_state(model.unload(), base)


def test_adapter_file_holds_exactly_scale_and_shift_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == adapter_of(TUNED)
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.get_parameter(in_model(name)))
        assert tensor.dtype is torch.float32


def test_the_adapter_takes_the_dtype_of_the_base_weight_where_asked(model, base, image, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    tuned = get_peft_model(copy.deepcopy(base), config(), autocast_adapter_dtype=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    for low_precision in (tuned, loaded):
        assert {low_precision.get_parameter(in_model(name)).dtype for name in adapter_of(TUNED)} == {dtype}
        assert low_precision(image).dtype is dtype
    assert trainable(tuned) == trainable(model)
    assert trainable(loaded) == set()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_to_the_same_model(low_cpu_mem_usage, model, base, image, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert same_state(loaded, model)
    assert torch.equal(loaded(image), model(image))
    assert trainable(loaded) == set()
    assert trainable(PeftModel.from_pretrained(base, tmp_path, is_trainable=True)) == trainable(model)


def test_modules_to_save_travel_with_the_adapter(base, image, train, tmp_path):
    model = train(get_peft_model(copy.deepcopy(base), config(modules_to_save=["norm", "head"])))
    for parameter in [*model.base_model.model.head.parameters(), *model.base_model.model.norm.parameters()]:
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "adapter_model.safetensors")
    whole_modules = {f"{WRAPPED}{module}.{name}" for module in ("norm", "head") for name in ("weight", "bias")}
    assert saved.keys() == adapter_of(TUNED).keys() | whole_modules
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(image), model(image))


def test_a_model_checkpoint_holds_no_factor(model, base):
    names = {name.replace(".base_layer", "").removeprefix(WRAPPED) for name in model.state_dict()}
    assert names == base.state_dict().keys() | {in_model(name).removeprefix(WRAPPED) for name in adapter_of(TUNED)}


def test_config_survives_its_json(tmp_path):
    original = config(
        exclude_modules=["fc2"], modules_to_save=["head"], layers_to_transform=[1], layers_pattern="blocks"
    )
    original.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SVD_SCALE_SHIFT"
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SVDScaleShiftConfig
    assert loaded.to_dict() == original.to_dict()


# Merging and taking off


def test_merge_and_unmerge(model, base, image, tolerance):
    before = copy.deepcopy(model)
    tuned_output = model(image)
    assert not torch.allclose(tuned_output, base(image), **tolerance)

    model.merge_adapter()
    assert not torch.equal(model.base_model.model.fc1.weight, base.fc1.weight)
    torch.testing.assert_close(model(image), tuned_output, **tolerance)

    model.unmerge_adapter()
    assert same_state(model, before)
    assert torch.equal(model(image), tuned_output)


def test_merge_and_unload_leaves_a_plain_model(model, base, image, tolerance):
    tuned_output = model(image)
    plain = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert plain.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(plain(image), tuned_output, **tolerance)


def test_unload_leaves_the_base_model(model, base):
    plain = model.unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert same_state(plain, base)


def test_safe_merge_refuses_nan_and_a_plain_merge_does_not(model, base):
    model.get_parameter(f"{WRAPPED}fc1.svd_scale_shift_b.default.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    fc1 = model.base_model.model.fc1
    assert torch.equal(fc1.base_layer.weight, base.fc1.weight)
    fc1.merge()
    assert fc1.weight.isnan().any()
    fc1.unmerge()
    assert torch.equal(fc1.base_layer.weight, base.fc1.weight)


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter_gives_the_base_models_output_to_the_last_bit(merged, model, base, image, tolerance):
    tuned_output = model(image)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(image), base(image))
    torch.testing.assert_close(model(image), tuned_output, **tolerance)


# Several adapters


@pytest.fixture
def two_adapters(model, train):
    """The second adapter tunes one layer of the first, and one that the first does not."""
    model.add_adapter("other", config(target_modules=["fc2", "head"]))
    return train(model, "other").eval()


def test_set_adapter_chooses_what_acts_and_what_trains(two_adapters, base, image, train):
    alone = get_peft_model(copy.deepcopy(base), config(target_modules=["fc2", "head"]), "other").eval()
    alone.load_state_dict(two_adapters.state_dict(), strict=False)
    default_output = two_adapters(image)
    assert {name.split(".")[-2] for name in trainable(two_adapters)} == {"default"}

    two_adapters.set_adapter("other")
    assert torch.equal(two_adapters(image), alone(image))
    assert trainable(two_adapters) == trainable(alone)
    two_adapters.set_adapter("default")
    assert torch.equal(two_adapters(image), default_output)


def test_adapters_of_different_layers_act_and_merge_together(two_adapters, image, tolerance):
    alone = copy.deepcopy(two_adapters)
    two_adapters.base_model.set_adapter(["default", "other"])
    output = two_adapters(image)
    for name in ("default", "other"):
        alone.set_adapter(name)
        assert not torch.allclose(output, alone(image), **tolerance)

    two_adapters.merge_adapter()
    torch.testing.assert_close(two_adapters(image), output, **tolerance)


def test_an_adapter_added_while_another_is_merged_starts_from_the_base_model(model, base, image, train, tolerance):
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", config())
    model.set_adapter("other")
    torch.testing.assert_close(model(image), base(image), **tolerance)

    alone = train(get_peft_model(copy.deepcopy(base), config(), "other")).eval()
    for name in adapter_of(TUNED):
        alone.get_parameter(in_model(name, "other")).data = model.get_parameter(in_model(name)).data
        model.get_parameter(in_model(name, "other")).data = model.get_parameter(in_model(name)).data
    assert torch.equal(model(image), alone(image))


def test_delete_adapter_leaves_no_trace_of_it(two_adapters, image):
    default_output = two_adapters(image)
    two_adapters.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        two_adapters.delete_adapter("other")
    assert torch.equal(two_adapters(image), default_output)
    assert [name for name in two_adapters.state_dict() if "other" in name] == []
    assert two_adapters.active_adapters == ["default"]


def test_a_merged_adapter_cannot_be_deleted(model):
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_two_saved_adapters_load_side_by_side(two_adapters, base, tmp_path):
    two_adapters.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert same_state(loaded, two_adapters)


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])
def test_a_copy_is_whole_and_independent(copied, two_adapters, image):
    output = two_adapters(image)
    twin = copied(two_adapters)
    for tensor in [*two_adapters.parameters(), *two_adapters.buffers()]:
        tensor.data.zero_()
    assert torch.equal(twin(image), output)


# transformers


@pytest.fixture
def causal_lm(tmp_path):
    """A tiny model with random weights, on disk as users have theirs."""
    size = {"vocab_size": 32, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 40, "num_attention_heads": 2}
    language_model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, max_position_embeddings=16, init_std=0.2, **size))
    language_model.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


TOKENS = torch.arange(2, 12).view(2, 5)


def test_auto_classes_load_an_adapter_and_its_base_model(causal_lm, train, tmp_path):
    model = train(get_peft_model(causal_lm, SVDScaleShiftConfig(task_type="CAUSAL_LM"))).eval()
    assert {name.split(".")[-4] for name in trainable(model)} == {"q_proj", "v_proj"}
    model.save_pretrained(tmp_path / "adapter")

    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path / "adapter")
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_transformers_own_adapter_methods(causal_lm, train, tmp_path):
    causal_lm.add_adapter(SVDScaleShiftConfig(target_modules=["fc1", "fc2"]))
    train(causal_lm).eval().save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in saved.values()} == {(16,)}
    assert len(saved) == 8

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(loaded(TOKENS).logits, causal_lm(TOKENS).logits)
    loaded.disable_adapters()
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded(TOKENS).logits, untouched(TOKENS).logits)


@pytest.mark.parametrize(
    "choices, layers",
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj", "fc1"], "layers_to_transform": 1}, {"1.self_attn.q_proj", "1.fc1"}),
        ({"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"0.fc1"}),
        ({"target_modules": r".*\.0\.fc[12]"}, {"0.fc1", "0.fc2"}),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*(self_attn\..*|1\.fc\d)"},
            {"0.fc1", "0.fc2"},
        ),
    ],
)
def test_the_config_chooses_the_layers(choices, layers, causal_lm):
    model = get_peft_model(causal_lm, SVDScaleShiftConfig(**choices))
    tuned = {name.rpartition(".svd_scale_shift_")[0].partition("decoder.layers.")[2] for name in trainable(model)}
    assert tuned == layers


# Errors that say what to do


class DoublingLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class RenamedLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module, target, message",
    [
        (nn.Sequential(nn.LayerNorm(4)), "0", "`0` cannot be tuned: it is LayerNorm, and none of Linear, Conv1D"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), "0", "`0` cannot be tuned: it is ConvTranspose2d"),
        (nn.Sequential(nn.Embedding(4, 4, max_norm=1)), "0", "`0` cannot be tuned: with `max_norm`"),
        (nn.Sequential(DoublingLinear(4, 4)), "0", "`0` cannot be tuned: DoublingLinear has its own forward"),
        (nn.Sequential(nn.Linear(4, 4)), "1", "not found in the base model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_that_cannot_be_tuned_is_refused_by_name(module, target, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        get_peft_model(module, SVDScaleShiftConfig(target_modules=[target]))
    if error.type is TypeError:
        assert "`exclude_modules`" in str(error.value)


def test_an_integer_weight_is_refused():
    linear = nn.Linear(4, 4).requires_grad_(False)
    linear.weight.data = torch.ones(4, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"`0` cannot be tuned: its weight is .*int8"):
        get_peft_model(nn.Sequential(linear), SVDScaleShiftConfig(target_modules=["0"]))


def test_a_subclass_with_the_forward_of_its_base_is_tuned():
    model = get_peft_model(nn.Sequential(RenamedLinear(4, 6)), SVDScaleShiftConfig(target_modules=["0"]))
    assert len(trainable(model)) == 2


class TransposedLinear(nn.Linear):
    """As Falcon's: the same product in other words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class ClampedLinear(nn.Linear):
    """The same product for small inputs alone."""

    def forward(self, x):
        return super().forward(x).clamp(-10, 10)


def test_a_subclass_with_a_forward_of_its_own_is_tuned_if_it_computes_the_same(train, relative_error):
    base = nn.Sequential(TransposedLinear(6, 5))
    model = get_peft_model(base, SVDScaleShiftConfig(target_modules=["0"]))
    x, tuned = torch.randn(3, 6), train(model)
    expected = tuned(x)
    assert relative_error(tuned.merge_and_unload()(x), expected) < 1e-6
    with pytest.raises(TypeError, match="ClampedLinear has its own forward, unlike Linear, and does not compute"):
        get_peft_model(nn.Sequential(ClampedLinear(6, 5)), SVDScaleShiftConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    "reparametrise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda linear: prune.random_unstructured(linear, "weight", 0.3),
    ],
    ids=["weight norm", "spectral norm", "weight norm as parametrization", "orthogonal", "pruning"],
)
def test_a_weight_that_is_computed_from_others_is_refused(reparametrise):
    module = nn.Sequential(reparametrise(nn.Linear(6, 6)))
    with pytest.raises(TypeError, match="`0` cannot be tuned: its weight is computed from other parameters"):
        get_peft_model(module, SVDScaleShiftConfig(target_modules=["0"]))


@pytest.mark.parametrize("linear", [nn.Linear(8, 0), nn.Linear(0, 8)], ids=str)
def test_a_layer_without_rows_or_columns_is_refused_by_name(linear):
    with pytest.raises(ValueError, match="`0` cannot be tuned: its weight has no rows or no columns"):
        get_peft_model(nn.Sequential(linear), SVDScaleShiftConfig(target_modules=["0"]))


def test_a_forward_that_was_patched_on_the_instance_runs():
    linear = nn.Linear(8, 8)
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)
    x = torch.randn(3, 8)
    expected = linear(x)
    model = get_peft_model(nn.Sequential(linear), SVDScaleShiftConfig(target_modules=["0"]))
    assert torch.equal(model(x), expected)


class TwoParents(nn.Module):
    def __init__(self):
        super().__init__()
        projection = nn.Linear(8, 8)
        self.first, self.second = (nn.ModuleDict({"projection": projection}) for _ in range(2))

    def forward(self, x):
        return self.second["projection"](self.first["projection"](x).tanh())


def test_a_module_under_two_parents_is_tuned_once_and_seen_by_both(train, relative_error):
    model = train(get_peft_model(TwoParents(), SVDScaleShiftConfig(target_modules=["projection"])))
    net = model.base_model.model
    assert net.first["projection"] is net.second["projection"]
    x = torch.randn(3, 8)
    expected = model(x)
    unloaded = model.merge_and_unload()
    assert relative_error(unloaded(x), expected) < 1e-6
    assert type(unloaded.first["projection"]) is nn.Linear
    assert unloaded.first["projection"] is unloaded.second["projection"]


@pytest.mark.parametrize("weight, message", [("meta", "meta device"), ("nan", "NaN or infinite")])
def test_a_weight_that_cannot_be_decomposed_is_refused(weight, message):
    module = nn.Sequential(nn.Linear(4, 4, device="meta" if weight == "meta" else None))
    if weight == "nan":
        nn.init.constant_(module[0].weight, float("nan"))
    with pytest.raises(ValueError, match=message):
        get_peft_model(module, SVDScaleShiftConfig(target_modules=["0"]))


def test_no_target_for_an_unknown_model_type_is_refused():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), SVDScaleShiftConfig())


@pytest.mark.parametrize(
    "choices, message",
    [
        (
            {"target_modules": ".*fc", "layers_to_transform": [0]},
            "`layers_to_transform` needs `target_modules` as a list",
        ),
        ({"target_modules": ["fc"], "layers_pattern": "blocks"}, "`layers_pattern` does nothing without"),
    ],
)
def test_a_contradictory_config_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        SVDScaleShiftConfig(**choices)


# Registration


def test_the_method_is_a_full_member_of_peft_type():
    member = peft.PeftType("SVD_SCALE_SHIFT")
    assert member is peft.PeftType.SVD_SCALE_SHIFT is peft.PeftType["SVD_SCALE_SHIFT"]
    assert list(peft.PeftType).count(member) == 1
    assert (member.name, member.value) == ("SVD_SCALE_SHIFT", "SVD_SCALE_SHIFT")
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert len({*peft.PeftType}) == len(peft.PeftType.__members__)


def test_registering_again_changes_nothing():
    members = list(peft.PeftType)
    svdtune.registration.register(SVDScaleShiftConfig, SVDScaleShiftModel)
    importlib.reload(svdtune)
    assert list(peft.PeftType) == members
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.SVD_SCALE_SHIFT] is SVDScaleShiftModel
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.SVD_SCALE_SHIFT] is SVDScaleShiftConfig


def test_another_method_of_the_same_name_is_refused():
    with pytest.raises(KeyError, match="svd_scale_shift"):
        svdtune.registration.register(SVDScaleShiftConfig, type("Other", (SVDScaleShiftModel,), {}))


def test_another_base_weight_brings_its_own_singular_values(train, paper_weight, relative_error):
    model = train(get_peft_model(Net(), config()))
    layer = model.base_model.model.fc2
    other = Net().fc2.weight.detach()
    model.load_state_dict({f"{WRAPPED}fc2.base_layer.weight": other}, strict=False)
    x = torch.randn(5, 12)
    scale, shift = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
    expected = x.double() @ paper_weight(other, scale, shift).T + layer.bias.double()
    assert relative_error(layer(x), expected) < 1e-6

    model.merge_adapter()
    with pytest.raises(ValueError, match=r"fc2\.base_layer\.weight cannot be loaded while an adapter is merged"):
        model.load_state_dict({f"{WRAPPED}fc2.base_layer.weight": torch.randn(20, 12)}, strict=False)
