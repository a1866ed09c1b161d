"""Every choice a user has."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from svdtune.registration import peft_type


@dataclass
class SVDScaleShiftConfig(PeftConfig):
    """Configuration of an adapter that scales and shifts the singular values of the layers it targets.

    W' = U diag(relu(A * S + B)) Vᵀ with W = U diag(S) Vᵀ; only A (from one) and B (from zero) learn, which makes
    2 * min(in, out) values a layer. From "S-SAM: SVD-based Fine-Tuning of Segment Anything Model for Medical Image
    Segmentation", equation 2.

    Args:
        target_modules: The ``nn.Linear`` and ``nn.Conv2d`` modules to tune. A list holds names, each matched exactly
            or as the end of a module's name; a string is a regular expression that must match the whole name;
            "all-linear" takes every linear layer but the output layer. If None, PEFT's defaults for the model type.
        exclude_modules: Modules to leave alone although ``target_modules`` matches them; list or regular expression.
        layers_to_transform: Index or indices of the layers to tune, among the modules that match; all if None.
        layers_pattern: Name of the ``nn.ModuleList`` that the indices count in, where it is not a usual one.
        modules_to_save: Modules trained whole and saved with the adapter, such as norms or a new head.
        init_weights: If False, A and B start at random values near the identity instead of on it; for tests.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of the modules to tune."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to tune; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved with the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` needs `target_modules` as a list of names, not as a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` does nothing without `layers_to_transform`: give both or neither.")


def _as_set(names):
    """PEFT matches lists of module names as sets."""
    return set(names) if isinstance(names, list) else names
