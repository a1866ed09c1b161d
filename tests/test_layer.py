"""Tuned layers against the paper's equation in float64."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from svdtune import SVDScaleShiftConfig
from svdtune.kinds import LAYER_KINDS

# A layer to tune, and the input that it is tried on.
LAYERS = {
    "linear, wide": (lambda: nn.Linear(40, 24), (2, 3, 40)),
    "linear, tall": (lambda: nn.Linear(24, 40, bias=False), (5, 24)),
    "linear, square": (lambda: nn.Linear(24, 24), (24,)),
    "linear, square, many rows": (lambda: nn.Linear(24, 24), (2, 50, 24)),
    "linear, tall, many rows": (lambda: nn.Linear(24, 40), (100, 24)),
    "conv": (lambda: nn.Conv2d(4, 10, 3), (2, 4, 8, 7)),
    "conv, 1x1 without bias": (lambda: nn.Conv2d(12, 8, 1, bias=False), (2, 12, 4, 4)),
    "conv, patches": (lambda: nn.Conv2d(3, 60, 4, stride=4), (2, 3, 8, 8)),
    "conv, stride, padding, dilation": (
        lambda: nn.Conv2d(4, 10, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        (2, 4, 8, 7),
    ),
    "conv, same": (lambda: nn.Conv2d(4, 10, 3, padding="same"), (2, 4, 8, 7)),
    "conv, reflect": (lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 7)),
    "conv, circular": (lambda: nn.Conv2d(4, 10, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 8, 7)),
    "conv, groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 6, 6)),
    "conv, depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding="same"), (2, 8, 6, 6)),
    "conv, no batch": (lambda: nn.Conv2d(4, 10, 3), (4, 8, 7)),
    "conv, one dimension": (lambda: nn.Conv1d(8, 12, 3, groups=2, stride=2), (2, 8, 9)),
    "conv, three dimensions": (lambda: nn.Conv3d(4, 10, (2, 3, 2), groups=2, padding=1), (2, 4, 4, 5, 6)),
    "transformers' Conv1D": (lambda: Conv1D(40, 24), (2, 3, 24)),
    "embedding": (lambda: nn.Embedding(40, 24, padding_idx=3), (2, 5)),
    "embedding, few": (lambda: nn.Embedding(16, 24), (2, 5)),
}
# Largest error of an output relative to its norm.
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 8e-3}

each_layer = pytest.mark.parametrize("make_layer, input_shape", LAYERS.values(), ids=LAYERS)
each_form = pytest.mark.parametrize("one_sided", [False, True], ids=["both sides", "one side"])


def tuned(base_layer, adapter_name="default", **choices):
    return LAYER_KINDS[type(base_layer)](
        base_layer.requires_grad_(False), adapter_name, SVDScaleShiftConfig(**choices)
    )


def input_of(base_layer, shape, dtype=torch.float32):
    if isinstance(base_layer, nn.Embedding):
        return torch.randint(0, base_layer.num_embeddings, shape)
    return torch.randn(shape).to(dtype)


def scale_and_shift(layer, adapter_name="default"):
    return layer.svd_scale_shift_scale[adapter_name], layer.svd_scale_shift_shift[adapter_name]


def learned_by(layer, adapter_name="default"):
    return layer.svd_scale_shift_a[adapter_name].weight, layer.svd_scale_shift_b[adapter_name].weight


def base_forward(base_layer, x, weight):
    """The base layer's own forward in float64, with another weight."""
    exact = copy.deepcopy(base_layer).double()
    return functional_call(exact, {"weight": weight.double()}, (x.double() if x.is_floating_point() else x,))


def held_storages(layer):
    spectrum = layer.spectrum
    held = [*layer.parameters(), *layer.buffers(), *spectrum.held_vectors]
    held += [spectrum.singular_values, spectrum.reciprocals]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


class AllocatedSizes(TorchDispatchMode):
    """Records the sizes of the tensors that operations make, leaving out views of what the layer holds."""

    def __init__(self, layer):
        super().__init__()
        self.held_storages = held_storages(layer)
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.held_storages:
                self.sizes.append(tensor.numel())
        return result


@each_form
@each_layer
def test_output_is_the_papers_formula(make_layer, input_shape, one_sided, dtype, train, paper_weight, relative_error):
    layer = train(tuned(make_layer().to(dtype), one_sided=one_sided))
    base_layer = layer.get_base_layer()
    x = input_of(base_layer, input_shape, dtype)
    weight = paper_weight(base_layer.weight, *scale_and_shift(layer), getattr(base_layer, "groups", 1))
    expected = base_forward(base_layer, x, weight)

    for y in (layer(x), torch.no_grad()(layer)(x)):
        assert y.dtype is dtype
        assert relative_error(y, expected) < PRECISION[dtype]
    assert relative_error(base_layer(x), expected) > 0.1


@each_layer
def test_an_untrained_adapter_changes_nothing(make_layer, input_shape, dtype, relative_error):
    base_layer = make_layer().to(dtype)
    x = input_of(base_layer, input_shape, dtype)
    assert relative_error(tuned(base_layer)(x), base_layer(x)) < PRECISION[dtype]


@each_layer
def test_where_the_base_layer_computes_an_untrained_adapter_changes_no_bit(make_layer, input_shape, dtype):
    base_layer = make_layer().to(dtype)
    x = input_of(base_layer, input_shape, dtype)
    for choices in ({"one_sided": True}, {"rank": 4}):
        layer = tuned(base_layer, **choices)
        if layer.spectrum.full_rank and layer.spectrum.sides == "both":
            continue  # U and V have taken the weight's place
        assert torch.equal(layer(x), base_layer(x))


@each_form
@each_layer
def test_gradients_are_those_of_the_papers_formula(
    make_layer, input_shape, one_sided, dtype, train, paper_weight, relative_error
):
    layer = train(tuned(make_layer().to(dtype), one_sided=one_sided))
    base_layer = layer.get_base_layer()
    x = input_of(base_layer, input_shape, dtype)
    learned = [x.requires_grad_()] if x.is_floating_point() else []
    learned += learned_by(layer)
    cotangent = torch.randn_like(base_layer(x))
    layer(x).backward(cotangent)

    exact = [tensor.detach().double().requires_grad_() for tensor in learned]
    weight = paper_weight(base_layer.weight, 1 + exact[-2], exact[-1], getattr(base_layer, "groups", 1))
    base_forward(base_layer, exact[0] if x.is_floating_point() else x, weight).backward(cotangent.double())

    clipped = exact[-1].grad == 0
    assert 0 < clipped.sum() < len(clipped)
    for actual, expected in zip(learned, exact, strict=True):
        assert relative_error(actual.grad, expected.grad) < 4 * PRECISION[dtype]
    for parameter in learned[-2:]:
        assert torch.all(parameter.grad[clipped] == 0)
    assert base_layer.weight.grad is None


@each_layer
def test_merging_gives_the_papers_weight_and_unmerging_every_bit_of_the_old_one(
    make_layer, input_shape, dtype, train, paper_weight, relative_error
):
    layer = train(tuned(make_layer().to(dtype)))
    base_layer = layer.get_base_layer()
    x = input_of(base_layer, input_shape, dtype)
    state, y = copy.deepcopy(layer.state_dict()), layer(x)
    expected = paper_weight(base_layer.weight, *scale_and_shift(layer), getattr(base_layer, "groups", 1))

    layer.merge()
    assert relative_error(base_layer.weight, expected) < PRECISION[dtype]
    assert relative_error(layer(x), y) < PRECISION[dtype]
    assert torch.equal(layer(x), base_layer(x))

    layer.unmerge()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(layer(x), y)


def test_a_float64_layer_is_tuned_in_float64(train, paper_weight, relative_error):
    layer, x = train(tuned(nn.Linear(24, 40).double())), torch.randn(3, 24).double()
    base_layer = layer.get_base_layer()
    expected = base_forward(base_layer, x, paper_weight(base_layer.weight, *scale_and_shift(layer)))
    assert relative_error(layer(x), expected) < 1e-12


def test_layers_that_share_a_weight_merge_and_unmerge_each_for_itself(train):
    shared = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    shared[1].weight = shared[0].weight
    original, x = shared[0].weight.detach().clone(), torch.randn(3, 8)
    layers = nn.Sequential(*[train(tuned(linear)) for linear in shared])
    expected = layers(x)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(layers(x), expected)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(layers[0].base_layer.weight, original)
    assert layers[0].base_layer.weight is layers[1].base_layer.weight


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_cast_between_two_merges_is_followed(train, relative_error):
    layer, x = train(tuned(nn.Linear(24, 40))), torch.randn(3, 24)
    layer.update_layer("other", SVDScaleShiftConfig())
    train(layer, "other").set_adapter(["default", "other"])
    expected = layer(x)
    layer.merge(adapter_names=["default"])
    layer.bfloat16().merge(adapter_names=["other"])
    assert relative_error(layer(x.bfloat16()), expected) < 2 * PRECISION[torch.bfloat16]
    layer.unmerge()
    assert relative_error(layer(x.bfloat16()), expected) < 2 * PRECISION[torch.bfloat16]


def test_scale_and_shift_stay_in_float32_when_the_model_is_cast(train):
    layer = train(tuned(nn.Linear(24, 40)))
    values = [parameter.detach().clone() for parameter in scale_and_shift(layer)]
    layer.bfloat16()
    assert layer.weight.dtype is torch.bfloat16
    for parameter, value in zip(scale_and_shift(layer), values, strict=True):
        assert torch.equal(parameter, value)
    assert {parameter.dtype for parameter in scale_and_shift(layer.double())} == {torch.float64}


def test_hooks_of_the_base_layer_are_called():
    layer, calls = tuned(nn.Linear(6, 4)), []
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append("forward"))
    layer.get_base_layer().register_forward_pre_hook(lambda *_: calls.append("before"))
    torch.testing.assert_close(layer(torch.ones(1, 6)), layer.get_base_layer()(torch.ones(1, 6)))
    assert calls == ["before", "forward"] * 2


def test_a_layer_goes_to_the_meta_device_and_back(train):
    layer = train(tuned(nn.Linear(6, 4)))
    weight = layer.weight.detach().clone()
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict({"base_layer.weight": weight}, strict=False)
    torch.testing.assert_close(layer.spectrum.singular_values, torch.linalg.svdvals(weight))


def test_a_base_weight_changed_after_unmerging_is_the_one_merged_next():
    layer = tuned(nn.Linear(6, 4))
    layer.merge()
    layer.unmerge()
    layer.get_base_layer().weight = nn.Parameter(torch.ones(4, 6))
    layer.merge()
    assert torch.equal(layer.weight, torch.ones(4, 6))


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("at_once", [True, False])
def test_adapters_add_their_changes(at_once, dtype, train, paper_weight, relative_error):
    layer, x = tuned(nn.Linear(24, 40).to(dtype)), torch.randn(3, 24).to(dtype)
    layer.update_layer("other", SVDScaleShiftConfig())
    train(train(layer, "default"), "other")
    base_layer = layer.get_base_layer()
    changes = [
        paper_weight(base_layer.weight, *scale_and_shift(layer, name)) - base_layer.weight.double()
        for name in ("default", "other")
    ]
    expected = base_forward(base_layer, x, base_layer.weight.double() + sum(changes))

    original = base_layer.weight.clone()
    layer.set_adapter(["default", "other"])
    assert relative_error(layer(x), expected) < PRECISION[dtype]
    for names in [["default", "other"]] if at_once else [["default"], ["other"]]:
        layer.merge(adapter_names=names)
    assert relative_error(layer(x), expected) < PRECISION[dtype]
    layer.unmerge()
    assert torch.equal(base_layer.weight, original)


def test_an_adapter_added_while_another_is_merged_sees_the_base_weight(dtype, train, paper_weight, relative_error):
    layer, x = train(tuned(nn.Linear(24, 40).to(dtype))), torch.randn(3, 24).to(dtype)
    base_layer = layer.get_base_layer()
    original = base_layer.weight.clone()
    layer.merge()
    layer.update_layer("other", SVDScaleShiftConfig())
    assert [parameter.requires_grad for parameter in scale_and_shift(layer, "other")] == [False, False]
    layer.unmerge()

    train(layer, "other").set_adapter("other")
    expected = base_forward(base_layer, x, paper_weight(original, *scale_and_shift(layer, "other")))
    assert relative_error(layer(x), expected) < PRECISION[dtype]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_layer_as_it_was(broken):
    layer = tuned(nn.Linear(6, 4))
    original = layer.get_base_layer().weight.clone()
    scale_and_shift(layer)[1].data[2] = broken
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.get_base_layer().weight, original)


@pytest.mark.parametrize(
    "make_layer, input_shape",
    [
        (lambda: nn.Linear(64, 48), (3, 64)),
        (lambda: nn.Linear(48, 64), (3, 48)),
        (lambda: nn.Conv2d(16, 48, 3), (1, 16, 4, 4)),
        (lambda: nn.Conv2d(16, 48, 3, groups=2), (1, 16, 4, 4)),
        (lambda: nn.Conv2d(4, 96, 3, groups=2), (1, 4, 4, 4)),
    ],
    ids=["linear, wide", "linear, tall", "conv", "conv, wide groups", "conv, tall groups"],
)
def test_a_training_step_makes_no_tensor_of_the_size_of_a_weight(make_layer, input_shape, train):
    layer, x = train(tuned(make_layer())), torch.randn(input_shape, requires_grad=True)
    with AllocatedSizes(layer) as allocated:
        layer(x).square().sum().backward()
    assert max(allocated.sizes) >= x.numel()
    assert max(allocated.sizes) < min(layer.spectrum.left.numel(), layer.spectrum.right.numel())


@pytest.mark.parametrize("input_requires_grad", [True, False])
@pytest.mark.parametrize(
    "choices, autocast", [({}, False), ({}, True), ({"one_sided": True}, False), ({"rank": 6}, False)], ids=str
)
def test_the_backward_pass_keeps_the_coordinates_and_not_the_input(choices, input_requires_grad, autocast, train):
    rows, in_features, rank = 50, 64, choices.get("rank", 16)
    layer = train(tuned(nn.Linear(in_features, 16), **choices))
    x = torch.randn(rows, in_features, requires_grad=input_requires_grad)
    held = held_storages(layer)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        layer(x)
    sizes = sorted(tensor.numel() for storage, tensor in kept.items() if storage not in held)
    assert sizes[-1] == rows * rank
    assert sum(sizes[:-1]) <= 4 * rank


def test_one_side_alone_is_held_where_that_was_asked_for_or_costs_less():
    layers = [nn.Linear(24, 40), nn.Linear(40, 24), nn.Conv2d(4, 10, 3), nn.Embedding(40, 24)]
    for layer in layers:
        weight = layer.weight.numel()
        for choices in ({"one_sided": True}, {"rank": 4}):
            spectrum = tuned(layer, **choices).spectrum
            smaller = min(layer.weight.flatten(1).shape)
            assert sum(tensor.numel() for tensor in spectrum.held_vectors) == spectrum.rank * smaller < weight


def test_singular_values_that_vanish_take_no_part_whatever_the_shift(dtype):
    layer = tuned(nn.Linear(40, 24).to(dtype))
    with torch.no_grad():
        layer.get_base_layer().weight[12:] = layer.get_base_layer().weight[:12]
        layer.get_base_layer().bias.zero_()
    layer = tuned(layer.get_base_layer())
    torch.nn.init.constant_(learned_by(layer)[1], 5.0)

    y = layer(torch.randn(7, 40).to(dtype))
    torch.testing.assert_close(y[:, :12], y[:, 12:])
    y.square().sum().backward()
    for parameter in learned_by(layer):
        assert torch.all(parameter.grad[:12] != 0)
        assert torch.all(parameter.grad[12:] == 0)

    layer.merge()
    torch.testing.assert_close(layer.weight[:12], layer.weight[12:])


def test_a_weight_of_zeros_stays_zero():
    layer = tuned(nn.Linear(6, 4, bias=False))
    nn.init.zeros_(layer.get_base_layer().weight)
    layer = tuned(layer.get_base_layer())
    torch.nn.init.constant_(learned_by(layer)[1], 5.0)
    assert torch.equal(layer(torch.randn(3, 6)), torch.zeros(3, 4))


@each_form
@pytest.mark.parametrize(
    "make_layer, input_shape",
    [LAYERS["linear, wide"], LAYERS["linear, square, many rows"], LAYERS["conv, groups"]],
    ids=["linear", "linear, many rows", "conv"],
)
def test_autocast_gives_the_dtype_and_the_values_that_the_base_layer_would(
    make_layer, input_shape, one_sided, train, paper_weight, relative_error
):
    layer, x = train(tuned(make_layer(), one_sided=one_sided)), torch.randn(input_shape)
    base_layer = layer.get_base_layer()
    weight = paper_weight(base_layer.weight, *scale_and_shift(layer), getattr(base_layer, "groups", 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is base_layer(x).dtype is torch.bfloat16
    assert relative_error(y, base_forward(base_layer, x, weight)) < PRECISION[torch.bfloat16]
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in learned_by(layer))


@each_form
@pytest.mark.parametrize(
    "make_layer, input_shape",
    [LAYERS["linear, wide"], LAYERS["linear, square, many rows"], LAYERS["conv, reflect"], LAYERS["embedding"]],
    ids=["linear", "linear, many rows", "conv", "embedding"],
)
def test_a_tuned_layer_compiles_into_one_graph(make_layer, input_shape, one_sided, train, relative_error):
    layer = train(tuned(make_layer(), one_sided=one_sided))
    x = input_of(layer.get_base_layer(), input_shape)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (layer, compiled):
        y = module(x)
        gradients.append(torch.autograd.grad(y.square().sum(), learned_by(layer)))
        assert relative_error(y, layer(x)) < 1e-6
    for expected, actual in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-5


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_is_whole_and_independent(merged, copied, train):
    layer, x = train(tuned(nn.Linear(24, 40))), torch.randn(3, 24)
    base_output, tuned_output = layer.get_base_layer()(x), layer(x)
    if merged:
        layer.merge()
    twin = copied(layer)
    torch.nn.init.zeros_(scale_and_shift(layer)[0])
    torch.nn.init.zeros_(layer.get_base_layer().weight)

    if merged:
        twin.unmerge()
    assert torch.equal(twin(x), tuned_output)
    twin.enable_adapters(False)
    assert torch.equal(twin(x), base_output)


def test_a_state_dict_holds_the_base_layer_and_the_adapter_only(train):
    layer = train(tuned(nn.Conv2d(8, 12, 3, groups=2)))
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "base_layer.weight": (12, 4, 3, 3),
        "base_layer.bias": (12,),
        "svd_scale_shift_a.default.weight": (12,),
        "svd_scale_shift_b.default.weight": (12,),
    }


@pytest.mark.parametrize("base_layer", [nn.Linear(8, 12), nn.Conv2d(8, 12, 3, groups=2)], ids=str)
def test_a_tuned_layer_shows_the_sizes_and_tensors_of_the_layer_it_replaces(base_layer):
    layer = tuned(base_layer)
    assert (layer.in_features, layer.out_features) == (8, 12)
    assert torch.equal(layer.weight, base_layer.weight) and layer.weight.dtype is base_layer.weight.dtype
    assert layer.bias is base_layer.bias


def test_a_tuned_layer_moves_to_another_dtype_with_its_factors(train, relative_error):
    layer, x = train(tuned(nn.Linear(24, 40))), torch.randn(3, 24)
    y = layer(x)
    assert relative_error(layer.bfloat16()(x.bfloat16()), y) < 2 * PRECISION[torch.bfloat16]
    layer.merge()
    layer.float().unmerge()
    assert layer.weight.dtype is torch.float32


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(broken):
    base_layer = nn.Linear(6, 4)
    base_layer.weight.data[1, 2] = broken
    with pytest.raises(ValueError, match="NaN or infinite"):
        tuned(base_layer)


def test_a_weight_without_values_is_refused():
    with pytest.raises(ValueError, match=r"meta device.*Load the base model before"):
        tuned(nn.Linear(6, 4, device="meta"))


@each_form
@pytest.mark.parametrize(
    "make_layer, input_shape", [LAYERS["linear, wide"], LAYERS["conv, groups"]], ids=["linear", "conv"]
)
def test_a_base_weight_that_is_written_to_is_decomposed_again(
    make_layer, input_shape, one_sided, train, paper_weight, relative_error
):
    layer, x = train(tuned(make_layer(), one_sided=one_sided)), torch.randn(input_shape)
    base_layer, before = layer.get_base_layer(), layer(x)
    with torch.no_grad():
        base_layer.weight.copy_(torch.randn_like(base_layer.weight))
    weight = paper_weight(base_layer.weight, *scale_and_shift(layer), getattr(base_layer, "groups", 1))
    expected = base_forward(base_layer, x, weight)
    assert relative_error(layer(x), expected) < 1e-5
    assert relative_error(before, expected) > 0.5
