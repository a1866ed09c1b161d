"""Every choice a user has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from svdtune.files import check_adapter_file, mention_plugin
from svdtune.registration import peft_type


@dataclass
class SVDScaleShiftConfig(PeftConfig):
    """Configuration of an adapter that scales and shifts the singular values of the layers it targets.

    W' = U diag(relu(A * S + B)) Vᵀ with W = U diag(S) Vᵀ; only A (from one) and B (from zero) learn, which makes
    2 * min(in, out) values a layer. From "S-SAM: SVD-based Fine-Tuning of Segment Anything Model for Medical Image
    Segmentation", equation 2. Its relatives are settings of the same config:

    - S-SAM: the defaults;
    - SVF ("Singular Value Fine-tuning"): ``shift=False, nonlinearity="none"``;
    - SVDiff's spectral shifts: ``scale=False``.

    Args:
        target_modules: The modules to tune: linear layers (quantised ones too), transformers' Conv1D, convolutions,
            embeddings and ``nn.MultiheadAttention``. A list holds names, each matched exactly or as the end of a
            module's name; a string is a regular expression that must match the whole name; "all-linear" takes every
            linear layer but the output layer. If None, the defaults for the model type.
        exclude_modules: Modules to leave alone although ``target_modules`` matches them; list or regular expression.
        target_parameters: Names of bare parameters to tune, such as the fused weights of experts; each is a matrix,
            or a stack of them. They are rebuilt at every forward, which costs more than tuning a module.
        layers_to_transform: Index or indices of the layers to tune, among the modules that match; all if None.
        layers_pattern: Name of the ``nn.ModuleList`` that the indices count in, where it is not a usual one.
        rank: How many leading singular values of a layer to tune: a number, a fraction of them between 0.0 and 1.0,
            or None for all. A layer that has fewer tunes all it has.
        rank_pattern: Other ranks for the layers whose names match: regular expressions to ranks.
        scale: Whether to learn A; otherwise it stays one.
        shift: Whether to learn B; otherwise it stays zero.
        nonlinearity: "relu", as in the paper, or "none", which lets singular values turn negative.
        bias: Which biases of the base model learn with the adapter: "none", "all", or "svd_scale_shift_only" for
            those of the tuned linear layers and convolutions.
        modules_to_save: Modules trained whole and saved with the adapter, such as norms or a new head.
        trainable_token_indices: Rows of the input embedding to train, or of the embeddings that a dictionary names.
        init_weights: If False, A and B start at random values near the identity instead of on it; for tests.
        one_sided: Whether to hold only the smaller side's singular vectors, U or V, of every layer: for a block of a
            transformer a third of its weights' memory in place of four thirds, for a quarter more multiply-adds.
            Layers that are quantised, or that tune only their leading values, do so anyway. Where a layer has several
            adapters it counts for the first, and for one that has a higher rank than those before.
        svd_cache: A folder to keep decompositions in, so that a weight is decomposed once and not at every load; by
            default the one that the environment variable ``SVDTUNE_CACHE`` names, if it does. Not saved.
        strict: Whether to refuse, instead of warn, when the adapter is loaded onto a base whose singular vectors
            differ from those that it was made for. It is not saved: give it to ``PeftModel.from_pretrained``, or set
            it on a config that was read with `from_pretrained` and is passed along.
        fingerprints: What each tuned weight answered to fixed changes of its singular values when the adapter was
            made (see `Spectrum.fingerprint`). Filled in when the adapter is saved.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of the modules to tune."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules to leave alone."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of bare parameters to tune, such as fused weights of experts."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to tune; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    rank: int | float | None = field(
        default=None, metadata={"help": "How many leading singular values to tune: number, fraction, or None for all."}
    )
    rank_pattern: dict[str, int | float] = field(
        default_factory=dict, metadata={"help": "Other ranks, for the layers whose names match a regular expression."}
    )
    scale: bool = field(default=True, metadata={"help": "Whether to learn A; otherwise it stays one."})
    shift: bool = field(default=True, metadata={"help": "Whether to learn B; otherwise it stays zero."})
    nonlinearity: str = field(default="relu", metadata={"help": 'What follows A * S + B: "relu" or "none".'})
    bias: str = field(
        default="none", metadata={"help": 'Which biases learn: "none", "all" or "svd_scale_shift_only".'}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embeddings that are trained and saved."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})
    one_sided: bool = field(
        default=False, metadata={"help": "Whether to hold the singular vectors of the smaller side only."}
    )
    svd_cache: str | None = field(default=None, metadata={"help": "A folder to keep decompositions in."})
    strict: bool = field(
        default=False, metadata={"help": "Whether to refuse a base model whose singular vectors differ."}
    )
    fingerprints: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "A few numbers that tell the singular vectors of each tuned weight."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` needs `target_modules` as a list of names, not as a string.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` needs `target_modules` as a list of names, not as a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` does nothing without `layers_to_transform`: give both or neither.")
        self.rank_pattern = self.rank_pattern or {}
        for name in ("scale", "shift", "one_sided", "strict", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it can be True or False.")
        if not (self.scale or self.shift):
            raise ValueError("Nothing would learn: `scale` and `shift` cannot both be False.")
        _check_choice("nonlinearity", self.nonlinearity, ("relu", "none"))
        _check_choice("bias", self.bias, ("none", "all", "svd_scale_shift_only"))
        for name, rank in {
            "rank": self.rank,
            **{f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()},
        }.items():
            _check_rank(name, rank)
        # Filled when a model is about to be saved. Not a field: what a config is used for next is another model.
        self.measured_fingerprints: dict[str, list[float]] = {}

    def rank_of(self, pattern: str | None, available: int) -> int:
        """How many of a layer's ``available`` singular values are tuned; ``pattern`` is its key in `rank_pattern`."""
        rank = self.rank if pattern is None else self.rank_pattern[pattern]
        if rank is None:
            return available
        return min(available, max(1, round(rank * available)) if isinstance(rank, float) else rank)

    def to_dict(self) -> dict[str, Any]:
        """The config as it is saved."""
        values = super().to_dict()
        values["fingerprints"] = self.fingerprints or self.measured_fingerprints or None
        del values["strict"], values["svd_cache"]
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes ``adapter_config.json``, and says in a model card beside it that loading needs this package."""
        super().save_pretrained(save_directory, **kwargs)
        mention_plugin(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SVDScaleShiftConfig:
        """Reads the config of an adapter, and in a local folder makes sure that the weights beside it are whole."""
        check_adapter_file(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)


def _as_set(names):
    """PEFT matches lists of module names as sets."""
    return set(names) if isinstance(names, list) else names


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it can be {', '.join(map(repr, choices))}.")


def _check_rank(name: str, rank: int | float | None) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    fraction = isinstance(rank, float) and 0 < rank <= 1
    if not (rank is None or whole or fraction):
        raise ValueError(
            f"`{name}` is {rank!r}; it can be a number from 1 up, a fraction in (0.0, 1.0], or None for all."
        )
