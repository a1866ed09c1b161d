"""Every choice a user has."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from svdtune.choices import check_choices
from svdtune.digests import DIGITS, Measurement
from svdtune.files import (
    CHOICES,
    check_adapter_file,
    check_config_file,
    digests_to_save,
    finish_adapter_files,
    mention_plugin,
    remove_link,
)
from svdtune.installing import how_to_install
from svdtune.learned import FORMAT_VERSION
from svdtune.registration import peft_type

# What belongs to a machine and its user, and is taken from no file. A downloaded adapter must not name folders.
OF_THIS_MACHINE: dict[str, Any] = {"svd_cache": None, "strict": False}
# The choices that change what saved values mean, and neither their names nor their shapes.
GIVE_MEANING = ("nonlinearity", "scale", "shift", "bias", "trainable_token_indices")


@dataclass
class SVDScaleShiftConfig(PeftConfig):
    """Configuration of an adapter that scales and shifts the singular values of the layers it targets.

    W' = U diag(relu(A * S + B)) Vᵀ with W = U diag(S) Vᵀ; only A = 1 + a and B learn, a and B from zero, which makes
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
        digests: A digest of each saved tensor by its name, and of the choices that give them meaning, by which damage
            is noticed. Filled in when the adapter is saved.
        format_version: Of the file that the config was read from; None if it was not read, or is from before 2.
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
    digests: dict[str, str] | None = field(
        default=None, metadata={"help": "A digest of each saved tensor, and of the choices that give them meaning."}
    )
    format_version: int | None = field(default=None, metadata={"help": "Of the file that the config was read from."})

    def __post_init__(self) -> None:
        # JSON has the type as a plain string; whoever writes Python leaves it out, or passes PEFT's own member.
        self.read_from_file = type(self.peft_type) is str
        if self.read_from_file:
            self._forget_what_is_of_this_machine()
        super().__post_init__()
        self.peft_type = peft_type()
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        check_choices(self)
        if self.format_version is not None and self.format_version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"`format_version` is {self.format_version!r}; this svdtune reads adapters up to version "
                f"{FORMAT_VERSION}. Install a newer svdtune: {how_to_install()}."
            )
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self.trainable_token_indices = self.trainable_token_indices or None
        # Measured just before the adapter is saved. Not fields: the same config may be used for another model.
        self.measured_fingerprints: dict[str, list[float]] = {}
        self.measured: Measurement | None = None
        # Of weights that are no file here, or not in safetensors. They are checked when they are loaded.
        self.unchecked_digests: dict[str, str] = dict(self.digests or {}) if self.read_from_file else {}

    def _forget_what_is_of_this_machine(self) -> None:
        given = [name for name, default in OF_THIS_MACHINE.items() if getattr(self, name) is not default]
        if given:
            warnings.warn(
                f"The adapter's config sets {' and '.join(f'`{name}`' for name in given)}, which no file may. Give it "
                "to PeftModel.from_pretrained.",
                stacklevel=4,
            )
        for name, default in OF_THIS_MACHINE.items():
            setattr(self, name, default)

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
        values["digests"] = self.digests or None
        values["format_version"] = FORMAT_VERSION
        for name in OF_THIS_MACHINE:
            del values[name]
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes ``adapter_config.json``, and says in a model card beside it that loading needs this package."""
        folder, loaded = Path(save_directory), self.digests
        if self.measured is not None:
            self.digests = digests_to_save(folder, self.measured)
        remove_link(folder / CHOICES)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            # The values may change before the config is saved again.
            self.digests, self.measured = loaded, None
        mention_plugin(folder)
        finish_adapter_files(folder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SVDScaleShiftConfig:
        """Reads the config of an adapter, and in a local folder makes sure that the weights beside it are whole.

        Raises:
            ValueError: with the name of the file, key or tensor, if one is missing, damaged, or not what was saved.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_config_file(folder)
        of_this_machine = {name: kwargs.pop(name) for name in OF_THIS_MACHINE if name in kwargs}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, cls):
            config.read_from_file = True
            config._check_what_is_read(folder)
            for name, default in OF_THIS_MACHINE.items():
                setattr(config, name, of_this_machine.get(name, default))
            check_choices(config)
        return config

    def _check_what_is_read(self, folder: Path) -> None:
        digests = self.digests or {}
        if digests and digests.get(CHOICES) != self.digest_of_choices():
            names = ", ".join(f"`{name}`" for name in (*GIVE_MEANING, "modules_to_save"))
            raise ValueError(
                f"{folder / CHOICES} is damaged: one of {names} has changed since it was saved. Copy or download it "
                "again."
            )
        if check_adapter_file(folder, digests):
            self.unchecked_digests = {}

    def digest_of_choices(self) -> str:
        """Of the choices that change what the values mean, and not their names and shapes."""
        choices = {name: getattr(self, name) for name in GIVE_MEANING}
        choices["modules_to_save"] = sorted(set(self.modules_to_save or ()))
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _as_set(names):
    """PEFT matches lists of module names as sets."""
    return set(names) if isinstance(names, (list, tuple, frozenset)) else names
