"""One weight's singular value decomposition: computed accurately, once, and kept beside the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The Gram matrix squares the condition number, so in float64 its eigenvectors are good to (1e-16 * condition**2);
# weights that are worse conditioned than this take the slower, direct decomposition.
GRAM_CONDITION_LIMIT = 1e4


class Spectrum(nn.Module):
    """U, S and Vᵀ of a batch of g matrices, as frozen buffers shared by all adapters of a layer.

    The buffers are not persistent: they follow ``.to()``, ``deepcopy`` and pickling, but enter no checkpoint,
    since the base weight that they come from is always there to compute them again.

    Args:
        matrices: (g, out, in), real and finite; g > 1 only for grouped convolutions.

    Attributes:
        left: U, (g, out, r), in the dtype of ``matrices``.
        singular_values: S, (g * r,), in float32 or better, descending within each group.
        right: Vᵀ, (g, r, in), in the dtype of ``matrices``.

    Singular values that are zero to working precision belong to arbitrary vectors. Their columns of U are zeroed,
    so that they take no part in any product and no gradient can lift them.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        device = matrices.device
        # Apple's GPUs have no float64.
        left, singular_values, right = decompose(matrices.cpu() if device.type == "mps" else matrices)
        left = left * (singular_values > zero_threshold(singular_values, matrices))[:, None, :]
        value_dtype = torch.promote_types(matrices.dtype, torch.float32)
        # Contiguous, so that a grouped convolution reads them as its kernels without a copy at every step.
        self.register_buffer("left", left.to(device, matrices.dtype).contiguous(), persistent=False)
        self.register_buffer("singular_values", singular_values.flatten().to(device, value_dtype), persistent=False)
        self.register_buffer("right", right.to(device, matrices.dtype).contiguous(), persistent=False)


@torch.no_grad()
def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of each matrix, in float64.

    Takes the Gram matrix of the smaller side (two to five times faster than a direct decomposition) wherever the
    condition number allows.

    Shapes: matrices (g, out, in); returns U (g, out, r), S (g, r) descending, Vᵀ (g, r, in).
    """
    matrices = matrices.double()
    if matrices.shape[1] < matrices.shape[2]:
        left, singular_values, right = decompose(matrices.mT)
        return right.mT, singular_values, left.mT

    eigenvalues, eigenvectors = torch.linalg.eigh(matrices.mT @ matrices)
    singular_values = eigenvalues.flip(-1).clamp(min=0).sqrt()
    if (singular_values[:, -1] * GRAM_CONDITION_LIMIT <= singular_values[:, 0]).any():
        return torch.linalg.svd(matrices, full_matrices=False)
    right = eigenvectors.flip(-1).mT
    left = matrices @ right.mT / singular_values[:, None, :]
    return left, singular_values, right


def zero_threshold(singular_values: Tensor, matrices: Tensor) -> Tensor:
    """The size below which a singular value is rounding noise of a float32 weight.

    The norm of such noise grows with the square root of the larger side, relative to the largest singular value.
    Shapes: singular_values (g, r), matrices (g, out, in); returns (g, 1).
    """
    noise = torch.finfo(torch.float32).eps * max(matrices.shape[1:]) ** 0.5
    return singular_values[:, :1] * noise
