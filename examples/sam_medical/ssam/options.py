"""One dataclass a command: its fields are the keys of the YAML file and the flags of the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from ssam.data.augmentation import AUGMENTATIONS
from ssam.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainOptions:
    """Train S-SAM on a folder of images and masks."""

    dataset: str = option(
        "brain-mri",
        "brain-mri, which needs no files; glas, cholecseg8k, abdominal-us, abdominal-us-real-1 to -5, chestx-det, "
        "lits-png; or own, for a folder of images and masks.",
    )
    data_root: str | None = option(None, "Folder of the dataset's files.")
    labels: list[str] | None = field(
        default=None, metadata={"help": "Labels to segment; all of the dataset's by default."}
    )
    output_dir: str = option("runs/ssam", "Where adapter, metrics, curves and overlays go.")

    backbone: str = option(
        "lite-medsam", "lite-medsam; hub name or folder of a SamModel; or a segment-anything .pth file."
    )
    text_encoder: str = option("minilm", "minilm; or hub name or folder of a CLIP, as openai/clip-vit-base-patch32.")
    image_size: int = option(128, "Side of the square that images are resized to, in pixels.")
    target_modules: str | None = option(
        None, "Regular expression of the layers to tune; by default all linear layers of the encoder and its neck."
    )

    steps: int = option(400, "Updates of the adapter.")
    batch_size: int = option(4, "Images a step and process.")
    gradient_accumulation_steps: int = option(1, "Batches that make one update.")
    learning_rate: float = option(5e-3, "Peak learning rate.")
    warmup_steps: int = option(20, "Updates over which the learning rate rises, before it falls along a cosine.")
    weight_decay: float = option(0.01, "AdamW's decay of the text affine layer's matrix; nothing else decays.")
    focal_weight: float = option(20.0, "Weight of the focal loss beside the Dice loss.")
    augmentation: str = option("upright", f"Random views of the training images: {' or '.join(AUGMENTATIONS)}.")
    mixed_precision: str = option("no", "no, bf16 or fp16.")
    num_workers: int = option(0, "Processes that read and augment images.")
    seed: int = option(0, "Of the initialisation, the order of the images and their augmentation.")

    validate_every: int = option(50, "Updates between two validations, after each of which the state is saved.")
    overlays: int = option(6, "Test images drawn with their true and predicted masks.")
    resume: bool = option(False, "Go on where an interrupted run in output_dir stopped; start anew if there is none.")
    overwrite: bool = option(False, "Replace a finished run in output_dir.")

    def __post_init__(self) -> None:
        for name in ("image_size", "steps", "batch_size", "gradient_accumulation_steps", "validate_every"):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("warmup_steps", "num_workers", "overlays", "weight_decay", "focal_weight"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        _require(self, "learning_rate", self.learning_rate > 0, "must be above 0")
        _require(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "must be no, bf16 or fp16")
        known = ", ".join(AUGMENTATIONS)
        _require(self, "augmentation", self.augmentation in AUGMENTATIONS, f"must be one of {known}")


@dataclass
class EvaluateOptions:
    """Score a trained adapter on one split of its dataset."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    dataset: str | None = option(None, "The dataset to read; by default the one the adapter was trained on.")
    split: str = option("test", "The split to score.")
    output: str = option("metrics.json", "File for the scores.")
    overlays: str | None = option(None, "Folder for pictures of the images with true and predicted masks.")
    backbone: str | None = option(None, "Where the pretrained weights are, if not where the adapter was trained.")
    batch_size: int = option(4, "Images a step.")

    def __post_init__(self) -> None:
        _require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        _require(self, "batch_size", self.batch_size >= 1, "must be at least 1")


@dataclass
class PredictOptions:
    """Segment images of one's own by the names of the labels."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    images: str = option("", "Folder of the images.")
    output: str = option("", "Folder for the masks, in a sub-folder a label.")
    backbone: str | None = option(None, "Where the pretrained weights are, if not where the adapter was trained.")
    batch_size: int = option(4, "Images a step.")

    def __post_init__(self) -> None:
        _require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        _require(self, "images", bool(self.images), "must be given, a folder of images")
        _require(self, "output", bool(self.output), "must be given, a folder for the masks")
        _require(self, "batch_size", self.batch_size >= 1, "must be at least 1")


def parse_options(options_type: type[T], arguments: list[str] | None = None) -> T:
    """Options from the command line, over those of the YAML file that ``--config`` names, over the defaults.

    Raises:
        UserError: for a flag or key that does not exist, or a value that is not of its type or range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(cast(Any, options_type), description=options_type.__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of these options; the command line goes before it.")
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        parser.set_defaults(**_read_yaml(Path(config), options_type, parser))
    namespace = vars(parser.parse_args(arguments))
    namespace.pop("config")
    return options_type(**namespace)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help.")


def _read_yaml(path: Path, options_type: type, parser: HfArgumentParser) -> dict[str, Any]:
    """The file's options, each checked and converted as if it had been given as a flag."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines of the form `key: value`.")
    names = [f.name for f in fields(cast(Any, options_type))]
    unknown = [str(key) for key in content if key not in names]
    if unknown:
        raise UserError(f"{path} has the unknown key {unknown[0]!r}; the keys are {', '.join(names)}.")
    flags: list[str] = []
    for key, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *map(str, values)]
    try:
        parsed = vars(parser.parse_args(flags))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {key: parsed[key] for key in content}


def _require(options: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} is {getattr(options, name)!r}, but it {rule}.")
