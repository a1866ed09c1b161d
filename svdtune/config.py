"""The config of an adapter, and how it is saved and loaded."""

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
    complete_model_card,
    digests_to_save,
    finish_adapter_files,
    remove_link,
)
from svdtune.installing import how_to_install
from svdtune.learned import FORMAT_VERSION
from svdtune.registration import peft_type

# Settings of the local machine. They are never read from a file: a downloaded adapter must not choose folders.
LOCAL_FIELDS: dict[str, Any] = {"svd_cache": None, "strict": False}
# Settings that change the meaning of saved values, but not their names or shapes.
SEMANTIC_FIELDS = ("nonlinearity", "scale", "shift", "bias", "trainable_token_indices")


@dataclass
class SVDScaleShiftConfig(PeftConfig):
    """Configuration of an adapter that scales and shifts the singular values of linear layers.

    For W = U diag(S) Vᵀ, the tuned weight is W' = U diag(relu(A * S + B)) Vᵀ with A = 1 + a. Only a and B are trained,
    2 * min(in, out) values per layer. Both are vectors with one value per tuned singular value. They start at zero, in
    float32 by default. The method is equation 2 of Paranjape et al., "S-SAM: SVD-based Fine-Tuning of Segment Anything
    Model for Medical Image Segmentation" (MICCAI 2024). Related methods are settings of this config:

    - S-SAM: the defaults;
    - SVF ("Singular Value Fine-tuning", Sun et al., NeurIPS 2022): ``shift=False, nonlinearity="none"``;
    - the spectral shifts of SVDiff (Han et al., ICCV 2023): ``scale=False``.

    The fields of `peft.PeftConfig` apply as well, for example ``task_type`` and ``inference_mode``.

    Args:
        target_modules: The modules to tune: linear layers (also quantised), transformers' Conv1D, convolutions,
            embeddings and ``nn.MultiheadAttention``. A list contains names, each equal to a module's name or to its
            end. A string is a regular expression that must match the whole name. "all-linear" selects every linear
            layer except the output layer. If None, the default of the model type applies.
        exclude_modules: Modules to skip although ``target_modules`` matches them; a list or a regular expression.
        target_parameters: Names of bare parameters to tune, such as the fused weights of experts. Each parameter is a
            matrix or a stack of matrices. It is rebuilt at every forward, which is slower than tuning a module.
        layers_to_transform: Index or indices of the layers to tune, among the matching modules. If None, all.
        layers_pattern: Name of the ``nn.ModuleList`` that ``layers_to_transform`` indexes, if it is an unusual one.
        rank: Number of leading singular values to tune per layer: an integer, a fraction in (0.0, 1.0], or None for
            all. A layer with fewer singular values tunes all of them.
        rank_pattern: Ranks of individual layers, as a dictionary from regular expressions for their names to ranks.
        scale: Whether to train A. If False, A = 1.
        shift: Whether to train B, which has the units of the singular values. If False, B = 0.
        nonlinearity: "relu", as in the paper, or "none", which allows negative singular values.
        bias: Which biases of the base model to train: "none", "all", or "svd_scale_shift_only" for the biases of
            tuned linear layers and convolutions.
        modules_to_save: Modules to train fully and to save with the adapter, such as norms or a new head.
        trainable_token_indices: Rows of the input embedding to train. A dictionary maps names of other embeddings to
            rows.
        init_weights: If False, A and B start at random values near the identity. Use it for tests.
        one_sided: Whether each layer stores only the smaller of U and V. A transformer block then needs a third of its
            weights' memory instead of four thirds, and a quarter more multiply-adds. Quantised layers, and layers with
            a reduced ``rank``, always do so. If a layer has several adapters, the setting of the first one applies,
            and that of a later one with a higher rank than all before.
        svd_cache: Folder of the decomposition cache, so that a weight is decomposed once and not at every load. If
            None, the environment variable ``SVDTUNE_CACHE`` applies, if set. It is not saved.
        strict: Whether to raise an error, instead of a warning, if the singular vectors of the base model differ from
            those that the adapter was trained on. It is not saved: pass it to ``PeftModel.from_pretrained``, or set
            it on a config from `from_pretrained`.
        fingerprints: Eight numbers per tuned weight that identify its singular vectors (see `Spectrum.fingerprint`).
            Set when the adapter is saved.
        digests: A digest per saved tensor, by name, and one of the settings that change the meaning of the values.
            They detect damaged files. Set when the adapter is saved.
        format_version: Format version of the file that the config was read from. None for a new config, and for files
            before version 2.

    Raises:
        ValueError: if a field is invalid. The message gives its name, its value and the allowed values.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to tune, or a regular expression."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to skip, or a regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of bare parameters to tune, such as fused weights of experts."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to tune; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform indexes."}
    )
    rank: int | float | None = field(
        default=None,
        metadata={"help": "Number of leading singular values to tune: integer, fraction, or all if None."},
    )
    rank_pattern: dict[str, int | float] = field(
        default_factory=dict, metadata={"help": "Ranks of individual layers, by a regular expression for their names."}
    )
    scale: bool = field(default=True, metadata={"help": "Whether to train A. If False, A = 1."})
    shift: bool = field(default=True, metadata={"help": "Whether to train B. If False, B = 0."})
    nonlinearity: str = field(default="relu", metadata={"help": 'Function applied to A * S + B: "relu" or "none".'})
    bias: str = field(
        default="none", metadata={"help": 'Which biases to train: "none", "all" or "svd_scale_shift_only".'}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train fully and to save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embeddings to train and to save."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})
    one_sided: bool = field(default=False, metadata={"help": "Whether to store only the smaller of U and V."})
    svd_cache: str | None = field(default=None, metadata={"help": "Folder of the decomposition cache."})
    strict: bool = field(
        default=False, metadata={"help": "Whether to raise an error if the base model's singular vectors differ."}
    )
    fingerprints: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Numbers that identify the singular vectors of each tuned weight."}
    )
    digests: dict[str, str] | None = field(
        default=None, metadata={"help": "A digest of each saved tensor, and of the settings that change its meaning."}
    )
    format_version: int | None = field(
        default=None, metadata={"help": "Format version of the file that the config was read from."}
    )

    def __post_init__(self) -> None:
        # A config from JSON has a plain string here. Python code omits the type, or passes the enum member.
        self.read_from_file = type(self.peft_type) is str
        if self.read_from_file:
            self._reset_local_fields()
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
        # Set just before saving. Not dataclass fields, because the same config may be reused for another model.
        self.measured_fingerprints: dict[str, list[float]] = {}
        self.measured: Measurement | None = None
        # Digests of weights that are not in a local safetensors file. They are checked when the weights are loaded.
        self.unchecked_digests: dict[str, str] = dict(self.digests or {}) if self.read_from_file else {}

    def _reset_local_fields(self) -> None:
        given = [name for name, default in LOCAL_FIELDS.items() if getattr(self, name) is not default]
        if given:
            warnings.warn(
                f"The adapter's config sets {' and '.join(f'`{name}`' for name in given)}, which no file may. Pass it "
                "to PeftModel.from_pretrained instead.",
                stacklevel=4,
            )
        for name, default in LOCAL_FIELDS.items():
            setattr(self, name, default)

    def rank_of(self, pattern: str | None, available: int) -> int:
        """The number of singular values to tune in a layer.

        Args:
            pattern: The layer's key in `rank_pattern`, or None for `rank`.
            available: The layer's number of singular values.
        """
        rank = self.rank if pattern is None else self.rank_pattern[pattern]
        if rank is None:
            return available
        return min(available, max(1, round(rank * available)) if isinstance(rank, float) else rank)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary for ``adapter_config.json``, without the settings of the local machine."""
        values = super().to_dict()
        values["fingerprints"] = self.fingerprints or self.measured_fingerprints or None
        values["digests"] = self.digests or None
        values["format_version"] = FORMAT_VERSION
        for name in LOCAL_FIELDS:
            del values[name]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes ``adapter_config.json``, and a model card that explains how to load the adapter.

        Args:
            save_directory: The adapter's folder. PEFT has already written the weights there.
            **kwargs: Options of PEFT's own method.
        """
        folder, loaded = Path(save_directory), self.digests
        if self.measured is not None:
            self.digests = digests_to_save(folder, self.measured)
        remove_link(folder / CHOICES)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            # Discard them: the values may change before the next save.
            self.digests, self.measured = loaded, None
        complete_model_card(folder)
        finish_adapter_files(folder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SVDScaleShiftConfig:
        """Reads an adapter's config. In a local folder, it also checks the weights against their digests.

        Args:
            pretrained_model_name_or_path: Folder or hub name of the adapter.
            subfolder: Sub-folder of the adapter.
            **kwargs: ``svd_cache``, ``strict``, and options of PEFT's own method.

        Returns:
            The config, of the class that the file names.

        Raises:
            ValueError: if a file, key or tensor is missing, damaged or changed. The message names it.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_config_file(folder)
        local_fields = {name: kwargs.pop(name) for name in LOCAL_FIELDS if name in kwargs}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, cls):
            config.read_from_file = True
            config._check_files(folder)
            for name, default in LOCAL_FIELDS.items():
                setattr(config, name, local_fields.get(name, default))
            check_choices(config)
        return config

    def _check_files(self, folder: Path) -> None:
        digests = self.digests or {}
        if digests and digests.get(CHOICES) != self.digest_of_choices():
            names = ", ".join(f"`{name}`" for name in (*SEMANTIC_FIELDS, "modules_to_save"))
            raise ValueError(
                f"{folder / CHOICES} is damaged: one of {names} has changed since it was saved. Copy or download it "
                "again."
            )
        if check_adapter_file(folder, digests):
            self.unchecked_digests = {}

    def digest_of_choices(self) -> str:
        """A digest of the settings that change the meaning of the values, but not their names or shapes."""
        choices = {name: getattr(self, name) for name in SEMANTIC_FIELDS}
        choices["modules_to_save"] = sorted(set(self.modules_to_save or ()))
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _as_set(names):
    """Converts a list of module names to a set, as PEFT does."""
    return set(names) if isinstance(names, (list, tuple, frozenset)) else names
