"""How much of the loss's gradient each kind of adapter can follow, at the pretrained weights.

    python benchmarks/medical_gradient_shares.py --dataset glas --data-root DATA \\
        --image-size 112 --augmentation any-orientation

For each linear layer that S-SAM tunes, G (out x in) is the gradient of its weight over --batches batches. An adapter's
first steps can only follow the part of G in its own directions: S-SAM's are u_i v_iᵀ, one a singular value; those of
LoRA at its start are all that have one of r random rows for their input; what LoRA can turn to later is bounded by the
best of its rank, which is G's own leading singular vectors. The table gives each part's share of |G|², over all
layers, and the same for the gradient about the mean input, sum_n g_n (x_n - mean x)ᵀ, without what a bias could do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import set_seed
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sam_medical.adapters.building import build_model
from sam_medical.adapters.task import Task
from sam_medical.common.choices import Augmentation
from sam_medical.common.errors import one_line_errors
from sam_medical.common.process import prepare_process
from sam_medical.data.loading import training_loader
from sam_medical.data.opening import open_dataset, settle_reading
from sam_medical.evaluation.report import markdown_table
from sam_medical.methods import METHODS
from sam_medical.models.text import encode_labels
from sam_medical.options.checks import check_values
from sam_medical.options.groups import DataOptions, ModelOptions, option
from sam_medical.options.parsing import parse_options
from sam_medical.training.losses import build_loss

RANKS = (1, 2, 8)


METHOD = "s-sam"


@dataclass
class GradientOptions(ModelOptions, DataOptions):
    """Measure how much of S-SAM's gradient each kind of adapter can follow."""

    fold: int | None = option(None, "The fold, from 1, of a dataset that has folds.")
    batches: int = option(8, "Batches that the gradient is summed over.")
    batch_size: int = option(4, "Images per batch.")
    augmentation: Augmentation = option("upright", "Random views of the images.")
    focal_weight: float = option(20.0, "Weight of the focal loss beside the Dice loss.")
    seed: int = option(0, "Seed of the initialisation, the order of the images and their augmentation.")

    def __post_init__(self) -> None:
        check_values(self)


class Gradient:
    """Sums the gradient of a linear layer's weight over batches.

    Args:
        layer: The layer, tuned or not; an adapter must still be the identity, so that W' is W.
        weight: W, (out, in).

    Attributes:
        whole: sum_n g_n x_nᵀ, (out, in), in float64.
        inputs, outputs: sum_n x_n and sum_n g_n.
        rows: How many there were.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self.weight = weight
        self.whole = torch.zeros_like(weight, dtype=torch.float64)
        self.outputs, self.inputs = self.whole[:, 0].clone(), self.whole[0].clone()
        self.rows = 0
        layer.register_forward_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0].detach().flatten(0, -2).double()

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).double()
            self.whole += g.mT @ x
            self.inputs += x.sum(0)
            self.outputs += g.sum(0)
            self.rows += len(x)

        output.register_hook(add)

    @property
    def about_the_mean(self) -> Tensor:
        """sum_n g_n (x_n - mean x)ᵀ."""
        return self.whole - torch.outer(self.outputs, self.inputs / self.rows)


def energies(gradient: Tensor, weight: Tensor) -> dict[str, float]:
    """|part|² of each part of a gradient (out, in), and of the whole."""
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    squares = torch.linalg.svdvals(gradient).square()
    found = {
        "all of it": squares.sum(),
        "S-SAM: u_i v_iᵀ of every singular value": ((left.mT @ gradient) * right).sum(1).square().sum(),
    }
    for rank in RANKS:
        rows = torch.linalg.qr(torch.randn(gradient.shape[1], rank, dtype=gradient.dtype))[0]
        found[f"LoRA r={rank} at its start"] = (gradient @ rows).square().sum()
    for rank in RANKS:
        found[f"the best of rank {rank}"] = squares[:rank].sum()
    return {name: float(energy) for name, energy in found.items()}


def shares(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Each part's share of |G|², over all layers' gradients and weights."""
    of_layers = [energies(gradient, weight) for gradient, weight in pairs]
    total = sum(energy["all of it"] for energy in of_layers)
    return {name: sum(energy[name] for energy in of_layers) / total for name in of_layers[0]}


@one_line_errors
def main() -> None:
    options = parse_options(GradientOptions)
    prepare_process()
    set_seed(options.seed)
    dataset = open_dataset(options.dataset, options.data_root, "train", options.labels, options.reading, options.fold)
    dataset.reading = settle_reading(dataset)
    task = Task.from_options(options, METHOD, dataset.labels, dataset.reading)
    model, _ = build_model(task, encode_labels(task.text_encoder, task.labels) if task.uses_text else None)
    gradients = [
        Gradient(module, base.weight.detach())
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and isinstance(base := module.get_base_layer(), nn.Linear)
    ]
    loss_function = build_loss(METHODS[task.method].loss, options.focal_weight)
    last = options.batches * options.batch_size
    for batch in training_loader(
        dataset, task.framing, options.batch_size, options.augmentation, options.seed, first=0, last=last
    ):
        loss_function(model(batch["images"], batch["masks"]), batch["masks"]).backward()
    whole = shares([(gradient.whole, gradient.weight) for gradient in gradients])
    centred = shares([(gradient.about_the_mean, gradient.weight) for gradient in gradients])
    rows = [[name, f"{whole[name]:.4f}", f"{centred[name]:.4f}"] for name in whole]
    print(markdown_table(["part", "of the gradient", "of it about the mean input"], rows))


if __name__ == "__main__":
    main()
