"""One weight's singular value decomposition: computed accurately, once, and kept beside the weight.

An adapter holds values that belong to vectors which are computed anew wherever it is loaded, so those vectors must
come out the same everywhere. What a decomposition leaves open is settled here: float64 whatever the weight's dtype, a
fixed basis where singular values are equal, and no vectors at all where they are zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from svdtune.cache import cached
from svdtune.float8 import readable
from svdtune.functional import weight_change

Sides = Literal["both", "left", "right"]

# Bump this when the computed result changes; it invalidates cached decompositions.
VERSION = 2
# The Gram matrix squares the condition number, so in float64 its eigenvectors are good to (1e-16 * condition**2);
# weights that are worse conditioned than this take the slower, direct decomposition.
GRAM_CONDITION_LIMIT = 1e4
# Only the lower triangle of a Gram matrix is read, and it is made of blocks of that many columns.
GRAM_BLOCK = 192
# Neighbours whose relative difference is below this count as equal. A float32 weight does not tell them apart.
EQUAL_VALUES_TOLERANCE = 1e-6
# How many times the rounding errors of a product may grow where singular values are divided by; see `tail_of`.
AMPLIFICATION_LIMIT = 4.0
# Singular values below this have no reciprocal in float32, in which S and 1 / S are kept.
SMALLEST_DIVISOR = 2 / torch.finfo(torch.float32).max
# How many fixed random changes of the singular values a fingerprint answers to.
FINGERPRINT_CHANGES = 7
FINGERPRINT_LENGTH = 1 + FINGERPRINT_CHANGES


class Spectrum(nn.Module):
    """U, S and Vᵀ of a batch of g matrices, shared by all adapters of a layer.

    They follow ``.to()``, ``deepcopy`` and pickling, but are plain tensors rather than parameters or buffers: the
    weight that they come from is always there to compute them again, so they enter no checkpoint, DDP does not
    broadcast them at every step, and no optimizer sees them.

    Args:
        matrices: (g, out, in), real and finite.
        rank: How many leading singular values of each matrix to keep; all r = min(out, in) if None.
        sides: Whose vectors to hold: both, or only "left" (U) or "right" (Vᵀ), since either follows from the other
            and the matrix by a division by S. Where S is too small to be divided by, both are held nevertheless.
        cache: A folder to find them in, or to leave them in for the next time; None for neither.

    Attributes:
        left: U, (g, out, rank), in the dtype of ``matrices``; only its last ``tail`` columns if the right is held.
        singular_values: S, (g * rank,), in float32 or better, descending within each matrix.
        right: Vᵀ, (g, rank, in), in the dtype of ``matrices``; only its last ``tail`` rows if the left is held.
        reciprocals: 1 / S, (g * rank,), and zero for the last ``tail``.
        tail: How many of the last values' vectors are held on both sides; all ``rank`` where both are held.
        full_rank: Whether every singular value was kept.

    Singular values that are zero to working precision belong to arbitrary vectors. Their columns of U are zeroed,
    so that they take no part in any product and no gradient can lift them.
    """

    def __init__(
        self, matrices: Tensor, rank: int | None = None, sides: Sides = "both", cache: Path | None = None
    ) -> None:
        super().__init__()
        self.sides = sides
        self.full_rank = rank is None or rank >= min(matrices.shape[1:])
        self.available_rank = min(matrices.shape[1:])
        held = cached(
            cache,
            (VERSION, rank, sides),
            matrices,
            compute=lambda: _what_is_held(matrices, rank, sides),
            fits=lambda tensors: _fits(tensors, matrices, rank, sides),
        )
        self._responses = _responses(matrices, sides, **held)
        device, dtype = matrices.device, torch.promote_types(matrices.dtype, torch.float32)
        self.left, self.right = held["left"].to(device), held["right"].to(device)
        self.singular_values = held["singular_values"].to(device, dtype)
        self.reciprocals = held["reciprocals"].to(device, dtype)

    @property
    def rank(self) -> int:
        """How many leading singular values are kept of each matrix."""
        return max(self.left.shape[2], self.right.shape[1])

    @property
    def tail(self) -> int:
        return min(self.left.shape[2], self.right.shape[1])

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def leading(self, values: Tensor, rank: int) -> Tensor:
        """The first ``rank`` of each matrix's values: (g * self.rank,) to (g * rank,)."""
        return values.reshape(-1, self.rank)[:, :rank].flatten()

    def padded(self, values: Tensor, rank: int) -> Tensor:
        """The reverse of `leading`, with zeros for the rest: (..., g * rank) to (..., g * self.rank)."""
        if rank == self.rank:
            return values
        grouped = values.unflatten(-1, (-1, rank))
        return torch.nn.functional.pad(grouped, (0, self.rank - rank)).flatten(-2)

    def of_tail(self, values: Tensor) -> Tensor:
        """The last ``tail`` of each matrix's values: (..., g * self.rank) to (..., g * tail)."""
        if self.tail == self.rank:
            return values
        return values.unflatten(-1, (-1, self.rank))[..., self.rank - self.tail :].flatten(-2)

    def change_of(self, matrices: Tensor, delta: Tensor) -> Tensor:
        """U diag(delta) Vᵀ, (g, out, in) in float32 or better, of the ``matrices`` that were decomposed, (g, out, in).

        Exactly zero where delta, (g * rank,), is zero.
        """
        if self.tail == self.rank:
            return weight_change(self.left, delta, self.right)
        relative = delta * self.reciprocals
        if self.sides == "right":
            change = weight_change(matrices @ self.right.mT.to(matrices), relative, self.right)
        else:
            change = weight_change(self.left, relative, self.left.mT.to(matrices) @ matrices)
        of_tail = weight_change(
            self.left[..., self.left.shape[2] - self.tail :],
            self.of_tail(delta),
            self.right[:, self.right.shape[1] - self.tail :],
        )
        return change + of_tail

    def fingerprint(self, rank: int) -> list[float]:
        """A few numbers that tell whether values learned here mean the same on another weight.

        The first is the norm of S; the others are gᵀ U diag(e * S) Vᵀ h, one for each fixed vector e of random signs,
        with fixed Gaussian g and h: what that change of the singular values does to the weight, seen from one side.
        They depend on U and Vᵀ but not on the signs that a decomposition leaves open. They are computed from the
        vectors as they are held, also where those come from a cache.
        """
        responses = self.leading(self._responses, rank)
        signs = np.random.RandomState(1).choice([-1.0, 1.0], size=(FINGERPRINT_CHANGES, len(responses)))
        norm = self.leading(self.singular_values, rank).double().norm().item()
        return [float(f"{number:.7g}") for number in [norm, *(torch.from_numpy(signs) @ responses).tolist()]]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.left, self.right = readable(fn(self.left)), readable(fn(self.right))
        # S stays in float32 or better: it is small, and the adapter multiplies it.
        dtype = torch.promote_types(self.right.dtype, torch.float32)
        for name in ("singular_values", "reciprocals"):
            values = getattr(self, name)
            if values.is_meta:  # from where only `to_empty` leads back
                values = torch.empty_like(values, dtype=dtype, device=self.device)
            setattr(self, name, values.to(self.device, dtype))
        return self


def fingerprint_distance(ours: list[float], theirs: list[float]) -> float:
    """How far two fingerprints are apart, relative to a random change of the singular values; about sqrt(2) for
    unrelated weights of one size, and infinite where their lengths differ."""
    if len(ours) != len(theirs):
        return float("inf")
    scale = max(ours[0], theirs[0]) or 1.0
    squares = [((a - b) / scale) ** 2 for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return max(abs(ours[0] - theirs[0]) / scale, (sum(squares) / max(len(squares), 1)) ** 0.5)


@torch.no_grad()
def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of each matrix, in float64, the same on every machine but for the signs of its vector pairs.

    Takes the Gram matrix of the smaller side (two to five times faster than a direct decomposition) wherever the
    condition number allows.

    Shapes: matrices (g, out, in); returns U (g, out, r), S (g, r) descending, Vᵀ (g, r, in).
    """
    matrices = matrices.double()
    if matrices.shape[1] < matrices.shape[2]:
        left, singular_values, right = decompose(matrices.mT)
        return right.mT, singular_values, left.mT

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
    """How many of the last singular values of any matrix are too small to be divided by.

    A product with W = U diag(S) Vᵀ errs by its rounding times rms(S). Of a change that is written as delta / S in the
    directions of V, the part that W makes of it is as large as delta, but the error grows with 1 / S: beside an error
    of the change itself by rms(S) * rms(1 / S). As many leading values as keep that below `AMPLIFICATION_LIMIT` are
    divided by. Shapes: singular_values (g, rank) descending, threshold (g, 1): what counts as zero.
    """
    mean_square = singular_values.square().mean(-1, keepdim=True)
    errors = (mean_square / singular_values.square()).cumsum(-1) / singular_values.shape[-1]
    can_be_divided_by = (errors <= AMPLIFICATION_LIMIT**2) & (singular_values > threshold.clamp(min=SMALLEST_DIVISOR))
    return int((~can_be_divided_by).sum(-1).max())


def _what_is_held(matrices: Tensor, rank: int | None, sides: Sides) -> dict[str, Tensor]:
    """The tensors of a `Spectrum`, by name."""
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
    if sides == "right":
        left = left[:, :, divided:]
    elif sides == "left":
        right = right[:, divided:]
    return {
        # Contiguous, so that a grouped convolution reads them as its kernels without a copy at every step.
        "left": left.to(dtype).contiguous(),
        "right": right.to(dtype).contiguous(),
        "singular_values": singular_values.flatten(),
        "reciprocals": reciprocals.flatten(),
    }


def _fits(held: Mapping[str, Tensor], matrices: Tensor, rank: int | None, sides: Sides) -> bool:
    """Whether tensors can be what `_what_is_held` returns, by their names, dtypes and shapes."""
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
    """The lower triangle of matricesᵀ matrices, in blocks; what is above them is zero. (g, out, in) to (g, in, in)."""
    size = matrices.shape[2]
    gram = matrices.new_zeros(len(matrices), size, size)
    for start in range(0, size, GRAM_BLOCK):
        block = matrices[:, :, start : start + GRAM_BLOCK]
        gram[:, start:, start : start + GRAM_BLOCK] = matrices[:, :, start:].mT @ block
    return gram


def _fix_bases_of_equal_values(matrix: Tensor, left: Tensor, singular_values: Tensor, right: Tensor) -> None:
    """Gives, in place, the vectors of equal singular values a basis that depends on their span alone.

    Any rotation of them is as good a decomposition, and each machine or route returns another one. Theirs is the basis
    of the span that is nearest to fixed random vectors (the polar factor of those vectors' projection).

    Shapes: matrix (out, in) with out >= in, left (out, in), singular_values (in,), right (in, in).
    """
    differs = singular_values[:-1] - singular_values[1:] > EQUAL_VALUES_TOLERANCE * singular_values[:-1]
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
    """gᵀ (s u vᵀ) h of each triple u, s, v that is held, with fixed Gaussian g and h: (g * rank,), float64 on the CPU.

    Where one side is held alone, the other follows from the matrix: gᵀ (s u) is gᵀ W v, and (s vᵀ) h is uᵀ W h. Sums
    are in float32 or better, which is exact enough for a fingerprint and reads the vectors once.
    """
    random = np.random.RandomState(2)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    g = torch.from_numpy(random.standard_normal(matrices.shape[1])).to(dtype)
    h = torch.from_numpy(random.standard_normal(matrices.shape[2])).to(dtype)
    of_left = (left.detach().to("cpu", dtype).mT @ g).double()
    of_right = (right.detach().to("cpu", dtype) @ h).double()
    values = singular_values.cpu().view(len(left), -1)
    tail = min(left.shape[2], right.shape[1])
    divided = values.shape[1] - tail
    both = values[:, divided:] * of_left[:, of_left.shape[1] - tail :] * of_right[:, of_right.shape[1] - tail :]
    if not divided:
        return both.flatten()
    weight = matrices.detach().to("cpu", dtype)
    if sides == "right":
        of_images = (right[:, :divided].detach().to("cpu", dtype) @ (g @ weight)[..., None])[..., 0]
        alone = of_images.double() * of_right[:, :divided]
    else:
        of_images = (left[..., :divided].detach().to("cpu", dtype).mT @ (weight @ h)[..., None])[..., 0]
        alone = of_images.double() * of_left[:, :divided]
    return torch.cat([alone, both], dim=1).flatten()
