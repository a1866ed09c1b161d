import copy
import io

import pytest
import torch

from svdtune.functional import weight_change
from svdtune.spectrum import Spectrum, decompose

SHAPES = {"tall": (1, 40, 24), "wide": (1, 24, 40), "square": (1, 24, 24), "batched": (3, 24, 40)}
SPECTRA = {
    "flat": torch.linspace(1, 2, 24),
    "condition 9e3": torch.logspace(0, -3.95, 24),
    "condition 1e5": torch.logspace(0, -5, 24),
    "condition 1e12": torch.logspace(0, -12, 24),
    "repeated": torch.ones(24),
    "rank-deficient": torch.cat([torch.linspace(1, 2, 9), torch.zeros(15)]),
    "zero": torch.zeros(24),
}


def orthogonal(groups, rows, columns):
    return torch.linalg.qr(torch.randn(groups, rows, columns, dtype=torch.float64)).Q


def matrices_of_spectrum(shape, singular_values):
    groups, rows, columns = shape
    rank = len(singular_values)
    return orthogonal(groups, rows, rank) * singular_values.double() @ orthogonal(groups, columns, rank).mT


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_decompose_agrees_with_lapack_in_float64(spectrum, shape):
    matrices = 5 * matrices_of_spectrum(shape, spectrum)
    left, singular_values, right = decompose(matrices)

    largest = matrices.abs().max().item()
    rebuilt = left * singular_values[:, None, :] @ right
    torch.testing.assert_close(rebuilt, matrices, rtol=0, atol=1e-12 * largest)
    torch.testing.assert_close(singular_values, torch.linalg.svdvals(matrices), rtol=1e-7, atol=1e-12 * largest)
    identity = torch.eye(24).double().expand(shape[0], -1, -1)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-7)
    torch.testing.assert_close(right @ right.mT, identity, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_vectors_are_those_of_lapack_up_to_sign(shape):
    matrices = matrices_of_spectrum(shape, SPECTRA["condition 9e3"])
    left, _, right = decompose(matrices)
    lapack_left, _, lapack_right = torch.linalg.svd(matrices, full_matrices=False)
    identity = torch.eye(24).double().expand(shape[0], -1, -1)
    torch.testing.assert_close((left.mT @ lapack_left).abs(), identity, rtol=0, atol=1e-7)
    torch.testing.assert_close((right @ lapack_right.mT).abs(), identity, rtol=0, atol=1e-7)


def test_one_ill_conditioned_matrix_does_not_spoil_the_batch():
    well = matrices_of_spectrum(SHAPES["tall"], SPECTRA["flat"])
    ill = matrices_of_spectrum(SHAPES["tall"], SPECTRA["rank-deficient"])
    left, singular_values, right = decompose(torch.cat([well, ill]))
    torch.testing.assert_close(left * singular_values[:, None, :] @ right, torch.cat([well, ill]), rtol=0, atol=1e-12)


def test_a_spectrum_is_rounded_once_from_float64(dtype):
    weight = torch.randn(1, 24, 40).to(dtype)
    spectrum = Spectrum(weight)
    assert (spectrum.left.dtype, spectrum.right.dtype, spectrum.singular_values.dtype) == (dtype, dtype, torch.float32)

    exact = torch.linalg.svdvals(weight.double()).flatten()
    torch.testing.assert_close(spectrum.singular_values, exact.float(), rtol=2e-7, atol=0)
    orthonormality = spectrum.left.double().mT @ spectrum.left.double() - torch.eye(24)
    assert orthonormality.abs().max() < torch.finfo(dtype).eps


def duplicated_rows():
    return torch.randn(9, 40).repeat(3, 1)[:24]


def zero_rows():
    return torch.cat([torch.randn(9, 40), torch.zeros(15, 40)])


def low_rank_product():
    return torch.randn(24, 9) @ torch.randn(9, 40)


def low_rank_product_of_integers():
    return torch.randint(-3, 4, (24, 9)).float() @ torch.randint(-3, 4, (9, 40)).float()


@pytest.mark.parametrize(
    "rank_9_weight, dtypes",
    [
        (duplicated_rows, [torch.bfloat16, torch.float32, torch.float64]),
        (zero_rows, [torch.bfloat16, torch.float32, torch.float64]),
        (low_rank_product, [torch.float32, torch.float64]),
        (low_rank_product_of_integers, [torch.bfloat16, torch.float32, torch.float64]),
    ],
)
def test_vectors_of_vanished_singular_values_are_removed(rank_9_weight, dtypes):
    for dtype in dtypes:
        norms = Spectrum(rank_9_weight().to(dtype)[None]).left[0].double().norm(dim=0)
        torch.testing.assert_close(norms[:9], torch.ones(9).double(), rtol=1e-2, atol=0)
        assert norms[9:].tolist() == [0.0] * 15


def test_a_small_but_genuine_singular_value_is_kept():
    weight = matrices_of_spectrum(SHAPES["wide"], SPECTRA["condition 1e5"]).float()
    assert Spectrum(weight).left[0].norm(dim=0).min() > 0.99


FACTORS = ("left", "singular_values", "right", "reciprocals")


def test_the_factors_enter_no_state_dict_but_follow_their_module():
    module = Spectrum(torch.randn(2, 6, 4))
    assert module.state_dict() == {}
    assert list(module.parameters()) == list(module.buffers()) == []
    for other in [copy.deepcopy(module), saved_and_loaded(module)]:
        for name in FACTORS:
            assert torch.equal(getattr(other, name), getattr(module, name))
            assert getattr(other, name).data_ptr() != getattr(module, name).data_ptr()
    moved = copy.deepcopy(module).to("meta")
    assert {getattr(moved, name).device.type for name in FACTORS} == {"meta"}
    halved = copy.deepcopy(module).bfloat16()
    assert [getattr(halved, name).dtype for name in FACTORS] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    assert torch.equal(halved.singular_values, module.singular_values)


def test_a_lower_rank_keeps_the_leading_triples_of_each_matrix():
    matrices = torch.randn(3, 24, 40)
    whole, leading = Spectrum(matrices), Spectrum(matrices, rank=5)
    assert (whole.full_rank, leading.full_rank, leading.rank) == (True, False, 5)
    assert torch.equal(leading.left, whole.left[:, :, :5])
    assert torch.equal(leading.right, whole.right[:, :5])
    assert torch.equal(leading.singular_values, whole.leading(whole.singular_values, 5))
    padded = whole.padded(leading.singular_values, 5).view(3, 24)
    assert torch.equal(padded[:, :5].flatten(), leading.singular_values)
    assert padded[:, 5:].count_nonzero() == 0


@pytest.mark.parametrize("sides", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_one_side_and_the_weight_give_the_same_change_as_both(spectrum, shape, sides, dtype, relative_error):
    matrices = matrices_of_spectrum(shape, spectrum).to(dtype)
    both, one = Spectrum(matrices), Spectrum(matrices, sides=sides)
    delta = torch.randn(shape[0] * 24) * spectrum.max()
    expected = weight_change(both.left, delta, both.right)
    if spectrum.max() > 0:
        assert relative_error(one.weight_change(matrices, delta), expected) < 10 * torch.finfo(dtype).eps
    else:
        assert torch.equal(one.weight_change(matrices, delta), expected)
    ours, theirs = (sum(tensor.numel() for tensor in spectrum.held_vectors) for spectrum in (one, both))
    assert ours <= theirs


def test_only_values_too_small_to_be_divided_by_have_both_their_vectors():
    assert Spectrum(matrices_of_spectrum(SHAPES["tall"], SPECTRA["flat"]), sides="right").tail == 0
    one_small = torch.cat([torch.linspace(2, 1, 23), torch.tensor([1e-3])])
    spectrum = Spectrum(matrices_of_spectrum(SHAPES["tall"], one_small), sides="right")
    assert (spectrum.tail, spectrum.rank) == (1, 24)
    assert spectrum.vectors.shape == (1, 24, 24)
    assert (spectrum.left.shape, spectrum.right.shape) == ((1, 40, 1), (1, 1, 24))
    torch.testing.assert_close(spectrum.reciprocals[:23], 1 / one_small[:23].double())
    assert spectrum.reciprocals[23] == 0


@pytest.mark.parametrize("sides", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_tail_has_its_vectors_of_both_sides_whichever_side_is_held(shape, sides):
    matrices = matrices_of_spectrum(shape, torch.cat([torch.linspace(2, 1, 21), torch.tensor([3e-3, 2e-3, 1e-3])]))
    both, one = Spectrum(matrices), Spectrum(matrices, sides=sides)
    assert (both.tail, one.tail) == (24, 3)
    assert torch.equal(one.vectors, both.left.mT if sides == "left" else both.right)
    assert torch.equal(one.left, both.left[..., 21:])
    assert torch.equal(one.right, both.right[:, 21:])
    values = torch.arange(shape[0] * 24.0)
    assert torch.equal(one.tail_values(values), values.view(-1, 24)[:, 21:].flatten())
