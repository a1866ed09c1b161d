"""One weight's singular value decomposition: computed accurately, once, and kept beside the weight.

An adapter holds one value per singular vector, and the vectors are computed again wherever it is loaded. So they must
be the same on every machine. A decomposition runs in float64 whatever the weight's dtype, picks a fixed basis where
singular values are equal, and drops vectors whose singular value is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from svdtune.cache import cached
from svdtune.float8 import readable
from svdtune.forms import Sides
from svdtune.functional import weight_change

# Bump this when the computed result changes; it invalidates cached decompositions.
VERSION = 2
# A Gram matrix squares the condition number: in float64 its eigenvectors are exact to 1e-16 * condition**2. Weights of
# a larger condition number take the slower, direct decomposition.
GRAM_CONDITION_LIMIT = 1e4
# `eigh` reads only the lower triangle of a Gram matrix, which is computed in blocks of so many columns.
GRAM_BLOCK = 192
# Singular values with a smaller relative difference count as equal: a float32 weight cannot tell them apart.
EQUAL_VALUES_TOLERANCE = 1e-6
# How much a division by singular values may amplify the rounding errors of a product; see `tail_of`.
AMPLIFICATION_LIMIT = 4.0
# Smaller singular values have no reciprocal in float32, in which S and 1 / S are kept.
SMALLEST_DIVISOR = 2 / torch.finfo(torch.float32).max
# How many fixed random changes of the singular values a fingerprint describes.
FINGERPRINT_CHANGES = 7
FINGERPRINT_LENGTH = 1 + FINGERPRINT_CHANGES


class Spectrum(nn.Module):
    """U, S and Vᵀ of a batch of g matrices, shared by all adapters of a layer.

    The tensors follow ``.to()``, ``deepcopy`` and pickling, but are neither parameters nor buffers. They can always be
    computed again from the weight, so checkpoints leave them out, DDP does not broadcast them, and no optimizer sees
    them.

    One side's vectors are enough: the other side's follow from W by a division by S, as U = W V / S. The last singular
    values, the tail, are too small to divide by. So a one-sided spectrum holds all vectors of its side, `vectors`, and
    for the tail those of both sides, `left` and `right`. With both sides held, the tail is all of the values.

    Args:
        matrices: (g, out, in), real and finite.
        rank: How many leading singular values of each matrix to keep; all min(out, in) if None.
        sides: Whose vectors to hold: those of both sides, or only "left" (U) or "right" (Vᵀ).
        cache: A folder in which to look for them, and to leave them; None for no cache.

    Attributes:
        sides: Whose vectors are held.
        shape: (out, in) of each matrix.
        rank: How many leading singular values of each matrix are kept.
        tail: How many of them, the last ones, have their vectors of both sides; all if ``sides`` is "both".
        full_rank: Whether every singular value is kept.
        singular_values: S, (g * rank,), in float32 or better, descending within each matrix.
        reciprocals: 1 / S, (g * rank,), and zero in the tail.

    Singular values that are zero to working precision belong to arbitrary vectors. Their columns of U are zeroed, so
    that they take no part in any product and no gradient can lift them.
    """

    def __init__(
        self, matrices: Tensor, rank: int | None = None, sides: Sides = "both", cache: Path | None = None
    ) -> None:
        super().__init__()
        self.sides = sides
        self.shape: tuple[int, int] = (matrices.shape[1], matrices.shape[2])
        held = cached(
            cache,
            (VERSION, rank, sides),
            matrices,
            compute=lambda: _held_tensors(matrices, rank, sides),
            fits=lambda tensors: _fits(tensors, matrices, rank, sides),
        )
        self.rank = max(held["left"].shape[2], held["right"].shape[1])
        self.tail = min(held["left"].shape[2], held["right"].shape[1])
        self.full_rank = self.rank == min(self.shape)
        self._responses = _responses(matrices, sides, **held)
        device, dtype = matrices.device, torch.promote_types(matrices.dtype, torch.float32)
        # As in a cache's file: a side that is not held has its last ``tail`` vectors alone.
        self._left, self._right = held["left"].to(device), held["right"].to(device)
        self.singular_values = held["singular_values"].to(device, dtype)
        self.reciprocals = held["reciprocals"].to(device, dtype)

    @property
    def vectors(self) -> Tensor:
        """All vectors of the side that is held, one per row: Uᵀ (g, rank, out) or Vᵀ (g, rank, in)."""
        return self._left.mT if self.sides == "left" else self._right

    @property
    def left(self) -> Tensor:
        """U of the tail, (g, out, tail), in the dtype of the matrices; all of U if both sides are held."""
        return self._left[..., self.rank - self.tail :] if self.sides == "left" else self._left

    @property
    def right(self) -> Tensor:
        """Vᵀ of the tail, (g, tail, in), in the dtype of the matrices; all of Vᵀ if both sides are held."""
        return self._right[:, self.rank - self.tail :] if self.sides == "right" else self._right

    @property
    def held_vectors(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold `vectors`, `left` and `right`, which are views of them."""
        return self._left, self._right

    @property
    def device(self) -> torch.device:
        return self._left.device

    @property
    def dtype(self) -> torch.dtype:
        return self._left.dtype

    def leading(self, values: Tensor, rank: int) -> Tensor:
        """The first ``rank`` of each matrix's values: (g * self.rank,) to (g * rank,)."""
        return values.reshape(-1, self.rank)[:, :rank].flatten()

    def padded(self, values: Tensor, rank: int) -> Tensor:
        """The reverse of `leading`, with zeros for the rest: (..., g * rank) to (..., g * self.rank)."""
        if rank == self.rank:
            return values
        grouped = values.unflatten(-1, (-1, rank))
        return torch.nn.functional.pad(grouped, (0, self.rank - rank)).flatten(-2)

    def tail_values(self, values: Tensor) -> Tensor:
        """The last ``tail`` of each matrix's values: (..., g * self.rank) to (..., g * tail)."""
        if self.tail == self.rank:
            return values
        return values.unflatten(-1, (-1, self.rank))[..., self.rank - self.tail :].flatten(-2)

    def weight_change(self, matrices: Tensor, delta: Tensor) -> Tensor:
        """U diag(delta) Vᵀ, (g, out, in) in float32 or better, of the ``matrices`` that were decomposed, (g, out, in).

        Exactly zero where delta, (g * rank,), is zero.
        """
        if self.tail == self.rank:
            return weight_change(self.left, delta, self.right)
        relative_delta = delta * self.reciprocals
        if self.sides == "right":  # U diag(delta) Vᵀ is (W V) diag(delta / S) Vᵀ
            change = weight_change(matrices @ self.vectors.mT.to(matrices), relative_delta, self.vectors)
        else:  # and U diag(delta / S) (Uᵀ W)
            change = weight_change(self.vectors.mT, relative_delta, self.vectors.to(matrices) @ matrices)
        return change + weight_change(self.left, self.tail_values(delta), self.right)

    def fingerprint(self, rank: int) -> list[float]:
        """A few numbers that tell whether values learned here mean the same on another weight.

        The first is the norm of S. The others are gᵀ U diag(e * S) Vᵀ h with fixed Gaussian g and h, one for each
        fixed vector e of random signs. Each shows how one change of the singular values acts on the weight. They
        depend on U and Vᵀ, but not on the signs that a decomposition leaves open. They are computed from the vectors
        that are held, whether those were computed here or came from a cache.
        """
        responses = self.leading(self._responses, rank)
        signs = np.random.RandomState(1).choice([-1.0, 1.0], size=(FINGERPRINT_CHANGES, len(responses)))
        norm = self.leading(self.singular_values, rank).double().norm().item()
        return [float(f"{number:.7g}") for number in [norm, *(torch.from_numpy(signs) @ responses).tolist()]]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._left, self._right = readable(fn(self._left)), readable(fn(self._right))
        # S stays in float32 or better: it is small, and the adapter multiplies it.
        dtype = torch.promote_types(self.dtype, torch.float32)
        for name in ("singular_values", "reciprocals"):
            values = getattr(self, name)
            if values.is_meta:  # only `to_empty` brings a tensor back from there
                values = torch.empty_like(values, dtype=dtype, device=self.device)
            setattr(self, name, values.to(self.device, dtype))
        return self


def fingerprint_distance(ours: list[float], theirs: list[float]) -> float:
    """How far two fingerprints are apart, relative to a random change of the singular values.

    It is about sqrt(2) for unrelated weights of one size, and infinite where the lengths differ.
    """
    if len(ours) != len(theirs):
        return float("inf")
    scale = max(ours[0], theirs[0]) or 1.0
    squares = [((a - b) / scale) ** 2 for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return max(abs(ours[0] - theirs[0]) / scale, (sum(squares) / max(len(squares), 1)) ** 0.5)


@torch.no_grad()
def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of each matrix in float64, the same on every machine but for the signs of its vector pairs.

    It decomposes the Gram matrix of the smaller side where the condition number allows. That is two to five times
    faster than a direct decomposition.

    Shapes: matrices (g, out, in); returns U (g, out, r), S (g, r) descending, Vᵀ (g, r, in).
    """
    matrices = matrices.double()
    if matrices.shape[1] < matrices.shape[2]:
        left, singular_values, right = decompose(matrices.mT)
        return right.mT, singular_values, left.mT

    # Wᵀ W = V diag(S²) Vᵀ, in ascending order.
    eigenvalues, eigenvectors = torch.linalg.eigh(_lower_gram(matrices))
    singular_values = eigenvalues.flip(-1).clamp(min=0).sqrt()
    if (singular_values[:, -1] * GRAM_CONDITION_LIMIT <= singular_values[:, 0]).any():
        left, singular_values, right = torch.linalg.svd(matrices, full_matrices=False)
    else:
        right = eigenvectors.flip(-1).mT
        left = (matrices @ right.mT).div_(singular_values[:, None, :])
    for index, matrix in enumerate(matrices):
        _fix_bases_of_equal_values(matrix, left[index], singular_values[index], right[index])
    return left, singular_values, right


def zero_threshold(singular_values: Tensor, matrices: Tensor) -> Tensor:
    """The size below which a singular value is rounding noise of a float32 weight.

    The norm of such noise grows with the square root of the larger side, relative to the largest singular value.
    Shapes: singular_values (g, r), matrices (g, out, in); returns (g, 1).
    """
    noise = torch.finfo(torch.float32).eps * max(matrices.shape[1:]) ** 0.5
    return singular_values[:, :1] * noise


def tail_of(singular_values: Tensor, threshold: Tensor) -> int:
    """How many of the last singular values of any matrix are too small to divide by.

    A product with W = U diag(S) Vᵀ has a rounding error in proportion to rms(S). The one-sided form multiplies W by
    V diag(delta / S) Vᵀ x, whose size grows with 1 / S, although the result is only as large as delta. So the error
    relative to the result is amplified by rms(S) * rms(1 / S). The leading values that keep this factor at
    `AMPLIFICATION_LIMIT` or below are divided by; the others are the tail.

    Shapes: singular_values (g, rank) descending, threshold (g, 1): values up to this count as zero.
    """
    mean_square = singular_values.square().mean(-1, keepdim=True)
    # The square of the amplification, if so many leading values are divided by.
    amplification = (mean_square / singular_values.square()).cumsum(-1) / singular_values.shape[-1]
    can_be_divided_by = (amplification <= AMPLIFICATION_LIMIT**2) & (
        singular_values > threshold.clamp(min=SMALLEST_DIVISOR)
    )
    return int((~can_be_divided_by).sum(-1).max())


def _held_tensors(matrices: Tensor, rank: int | None, sides: Sides) -> dict[str, Tensor]:
    """The tensors that a `Spectrum` holds, by their names in a cache's file."""
    dtype = matrices.dtype
    # Apple's GPUs have no float64.
    left, singular_values, right = decompose(matrices.cpu() if matrices.device.type == "mps" else matrices)
    threshold = zero_threshold(singular_values, matrices)
    if (singular_values <= threshold).any():
        left *= (singular_values > threshold)[:, None, :]
    left, singular_values, right = left[:, :, :rank], singular_values[:, :rank], right[:, :rank]
    kept = singular_values.shape[1]
    divided = 0 if sides == "both" else kept - tail_of(singular_values, threshold)
    reciprocals = torch.zeros_like(singular_values)
    reciprocals[:, :divided] = 1 / singular_values[:, :divided]
    # Of a side that is not held, only the tail.
    if sides == "right":
        left = left[:, :, divided:]
    elif sides == "left":
        right = right[:, divided:]
    return {
        # Contiguous, so that a grouped convolution uses them as kernels without a copy per step.
        "left": left.to(dtype).contiguous(),
        "right": right.to(dtype).contiguous(),
        "singular_values": singular_values.flatten(),
        "reciprocals": reciprocals.flatten(),
    }


def _fits(held: Mapping[str, Tensor], matrices: Tensor, rank: int | None, sides: Sides) -> bool:
    """Whether the names, dtypes and shapes of tensors are those of `_held_tensors`."""
    if held.keys() != {"left", "right", "singular_values", "reciprocals"}:
        return False
    count, out_features, in_features = matrices.shape
    kept = min(out_features, in_features, rank or out_features)
    left, right = held["left"], held["right"]
    if left.ndim != 3 or right.ndim != 3:
        return False
    ranks = (left.shape[2] if sides != "right" else kept, right.shape[1] if sides != "left" else kept)
    return (
        left.shape[:2] == (count, out_features)
        and right.shape[::2] == (count, in_features)
        and ranks == (kept, kept)
        and max(left.shape[2], right.shape[1]) == kept
        and left.dtype == right.dtype == matrices.dtype
        and all(
            held[name].shape == (count * kept,) and held[name].dtype == torch.float64
            for name in ("singular_values", "reciprocals")
        )
    )


def _lower_gram(matrices: Tensor) -> Tensor:
    """The lower triangle of matricesᵀ matrices, in blocks, with zeros above them: (g, out, in) to (g, in, in)."""
    size = matrices.shape[2]
    gram = matrices.new_zeros(len(matrices), size, size)
    for start in range(0, size, GRAM_BLOCK):
        block = matrices[:, :, start : start + GRAM_BLOCK]
        gram[:, start:, start : start + GRAM_BLOCK] = matrices[:, :, start:].mT @ block
    return gram


def _fix_bases_of_equal_values(matrix: Tensor, left: Tensor, singular_values: Tensor, right: Tensor) -> None:
    """Gives the vectors of equal singular values, in place, a basis that depends on their span alone.

    Any rotation of them is an equally good decomposition, and each machine or algorithm returns a different one. The
    basis taken here is the one nearest to fixed random vectors: the polar factor of their projection onto the span.

    Shapes: matrix (out, in) with out >= in, left (out, in), singular_values (in,), right (in, in).
    """
    differs = singular_values[:-1] - singular_values[1:] > EQUAL_VALUES_TOLERANCE * singular_values[:-1]
    # Runs of equal values, by where they begin and end.
    edges = [0, *(differs.nonzero().flatten() + 1).tolist(), len(singular_values)]
    threshold = zero_threshold(singular_values[None], matrix[None]).item()
    for start, end in itertools.pairwise(edges):
        if end - start == 1 or singular_values[start] <= threshold:
            continue
        span = right[start:end].mT
        probes = torch.from_numpy(np.random.RandomState(0).standard_normal((len(right), end - start))).to(span)
        rotation, _, towards = torch.linalg.svd(span.mT @ probes)
        basis = span @ rotation @ towards
        image = matrix @ basis
        right[start:end] = basis.mT
        singular_values[start:end] = image.norm(dim=0)
        left[:, start:end] = image / singular_values[start:end]


def _responses(
    matrices: Tensor, sides: Sides, left: Tensor, right: Tensor, singular_values: Tensor, reciprocals: Tensor
) -> Tensor:
    """gᵀ (s u vᵀ) h of each triple u, s, v, with fixed Gaussian g and h: (g * rank,), float64 on the CPU.

    Where only one side is held, the other follows from the matrix: gᵀ (s u) is gᵀ W v, and (s vᵀ) h is uᵀ W h. Sums
    are in float32 or better, which is exact enough for a fingerprint and reads the vectors once.
    """
    random = np.random.RandomState(2)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    g = torch.from_numpy(random.standard_normal(matrices.shape[1])).to(dtype)
    h = torch.from_numpy(random.standard_normal(matrices.shape[2])).to(dtype)
    g_left = (left.detach().to("cpu", dtype).mT @ g).double()
    right_h = (right.detach().to("cpu", dtype) @ h).double()
    values = singular_values.cpu().view(len(left), -1)
    tail = min(left.shape[2], right.shape[1])
    divided = values.shape[1] - tail
    # The tail has both its vectors.
    tail_responses = values[:, divided:] * g_left[:, g_left.shape[1] - tail :] * right_h[:, right_h.shape[1] - tail :]
    if not divided:
        return tail_responses.flatten()
    weight = matrices.detach().to("cpu", dtype)
    if sides == "right":
        g_weight_v = (right[:, :divided].detach().to("cpu", dtype) @ (g @ weight)[..., None])[..., 0]
        leading_responses = g_weight_v.double() * right_h[:, :divided]
    else:
        u_weight_h = (left[..., :divided].detach().to("cpu", dtype).mT @ (weight @ h)[..., None])[..., 0]
        leading_responses = u_weight_h.double() * g_left[:, :divided]
    return torch.cat([leading_responses, tail_responses], dim=1).flatten()
