"""One dataclass a command: its fields are the keys of the YAML file and the flags of the command line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from sam_medical.common.errors import UserError
from sam_medical.common.paths import why_no_file, why_no_folder, why_not_a_path
from sam_medical.common.values import LARGEST_IMAGE, LONGEST_TEXT, shortened
from sam_medical.data.augmentation import AUGMENTATIONS
from sam_medical.data.geometry import PLANES, STORED
from sam_medical.data.intensity import FORMS, parse_intensity
from sam_medical.data.loading import FITS, LEAST_TILE, Framing
from sam_medical.data.offset import FORMS as OFFSETS
from sam_medical.data.offset import check_offset
from sam_medical.data.reading import Reading
from sam_medical.evaluation.metrics import CRITERIA
from sam_medical.methods import METHODS
from sam_medical.models.prompts import PROMPTS

T = TypeVar("T")

LARGEST_CONFIG = 2**20  # bytes
LONGEST_MESSAGE = 500
LARGEST_FACTOR = 1e6
PLAIN = (str, int, float, bool, date, type(None))
# Least and most.
LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (1, LARGEST_IMAGE),
    "tile": (LEAST_TILE, LARGEST_IMAGE),
    "steps": (1, 10**8),
    "batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 10**6),
    "learning_rate": (0, 1e3),
    "value_rate": (0, 1e6),
    "warmup_steps": (0, 10**8),
    "weight_decay": (0, 1e3),
    "focal_weight": (0, 1e6),
    "num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "validate_every": (1, 10**8),
    "validation_images": (1, 10**9),
    "overlays": (0, 10**6),
    "seeds": (1, 10**6),
    "folds": (1, 10**4),
    "jobs": (1, 1024),
    "examples": (1, 10**4),
    "rounds": (1, 10**6),
}
ABOVE_ZERO = ("learning_rate", "value_rate")
# Of files and folders; of a base model or text encoder, which may be one, a name on the hub stays as it is.
PATHS = (
    *("data_root", "output_dir", "adapter", "images", "output", "csv", "markdown", "scores", "against", "sheet"),
    *("json", "dump", "report"),
    *("backbone", "text_encoder"),
)


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


class WhatTheModelSees:
    """Options that say how files are read and brought to the model's square."""

    intensity: str
    offset: str
    plane: str
    resample_masks: bool
    image_size: int
    fit: str
    tile: int | None

    @property
    def reading(self) -> Reading:
        return Reading(self.intensity, self.plane, self.resample_masks, offset=self.offset)

    @property
    def framing(self) -> Framing:
        return Framing(self.image_size, self.fit, self.tile)


@dataclass
class TrainOptions(WhatTheModelSees):
    """Train S-SAM, or another method, on a folder of images and masks."""

    method: str = option("s-sam", f"How to train: {', '.join(METHODS)}.")

    dataset: str = option(
        "brain-mri",
        "brain-mri, which needs no files; glas, cholecseg8k, abdominal-us, abdominal-us-real-1 to -5, chestx-det, "
        "lits-png; or own, for a folder of images and masks.",
    )
    data_root: str | None = option(None, "Folder of the dataset's files.")
    labels: list[str] | None = field(
        default=None, metadata={"help": "Labels to segment; all of the dataset's by default."}
    )
    intensity: str = option(
        "auto",
        f"How values become grey: {FORMS}. auto leaves eight bits as they are, gives CT the soft-tissue window, and "
        "other deep images percentiles of what is not background.",
    )
    offset: str = option(
        "auto", f"What CT's values were stored with, in files without negative ones: {OFFSETS}; auto is by all images."
    )
    plane: str = option("axial", f"Of volumes, by their orientation in space: {', '.join(PLANES)}.")
    resample_masks: bool = option(False, "Bring a mask on another grid to its image's, by the nearest voxel.")
    output_dir: str = option("runs/ssam", "Where adapter, metrics, curves and overlays go.")

    backbone: str = option(
        "lite-medsam", "lite-medsam; hub name or folder of a SamModel; or a segment-anything .pth file."
    )
    text_encoder: str = option("minilm", "minilm; or hub name or folder of a CLIP, as openai/clip-vit-base-patch32.")
    image_size: int = option(128, "Side of the square that images are resized to, in pixels.")
    fit: str = option("stretch", "stretch images to the square; or pad, which keeps their aspect.")
    tile: int | None = option(
        None, "Train on crops of so many pixels a side, and segment by a sliding window, in place of whole images."
    )
    prompt: str = option("text", "text; or learned, a token a label for names that no text encoder tells apart.")
    target_modules: str | None = option(
        None, "Regular expression of the layers to tune; by default all linear layers of the encoder and its neck."
    )

    steps: int = option(400, "Updates of the adapter.")
    batch_size: int = option(4, "Images a step and process.")
    gradient_accumulation_steps: int = option(1, "Batches that make one update.")
    learning_rate: float | None = option(None, "Peak learning rate; by default the method's, 5e-3 for S-SAM.")
    value_rate: float = option(5.0, "Learning rate of A and B, as a multiple of the others'.")
    warmup_steps: int = option(20, "Updates over which the learning rate rises, before it falls along a cosine.")
    weight_decay: float = option(
        0.01, "AdamW's decay of matrices that learn: of S-SAM, the text affine layer's alone."
    )
    focal_weight: float = option(20.0, "Weight of the focal loss beside the Dice loss.")
    augmentation: str = option("upright", f"Random views of the training images: {' or '.join(AUGMENTATIONS)}.")
    mixed_precision: str = option("no", "no, bf16 or fp16.")
    gradient_checkpointing: bool = option(
        False, "Compute the encoder's blocks again instead of keeping what they made."
    )
    compile: bool = option(
        False, "Compile the model with torch.compile; the first steps take longer, the others less."
    )
    num_workers: int = option(0, "Processes that read and augment images.")
    seed: int = option(0, "Of the initialisation, the order of the images and their augmentation.")

    validate_every: int = option(50, "Updates between two validations, after each of which the state is saved.")
    validation_images: int | None = option(
        None, "Validate on so many images, evenly from the first to the last; on all by default."
    )
    choose_by: str = option(
        "pooled-dice",
        "Which Dice on validation makes an adapter the best: pooled-dice, of each label's pixels together; or dice, "
        "the paper's, to which predicting nothing looks good where labels are rare.",
    )
    overlays: int = option(6, "Test images drawn with their true and predicted masks.")
    report_to: str | None = option(
        None, "A tracker that accelerate knows, such as tensorboard, beside the run's files."
    )
    resume: bool = option(False, "Go on where an interrupted run in output_dir stopped; start anew if there is none.")
    overwrite: bool = option(False, "Replace a finished run in output_dir.")

    def __post_init__(self) -> None:
        check_values(self)
        check_reading(self)
        require(self, "fit", self.fit in FITS, f"must be {' or '.join(FITS)}")
        require(self, "prompt", self.prompt in PROMPTS, f"must be {' or '.join(PROMPTS)}")
        require(self, "method", self.method in METHODS, f"must be one of {', '.join(METHODS)}")
        whole = self.tile is None or not METHODS[self.method].needs_expert
        require(self, "tile", whole, f"has no meaning for {METHODS[self.method].title}, which sees the whole image")
        if self.prompt == "learned":
            prompted = METHODS[self.method].needs_text
            require(self, "prompt", prompted, f"has no meaning for {METHODS[self.method].title}; leave it out")
        require(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "must be no, bf16 or fp16")
        require(self, "choose_by", self.choose_by in CRITERIA, f"must be one of {', '.join(CRITERIA)}")
        known = ", ".join(AUGMENTATIONS)
        require(self, "augmentation", self.augmentation in AUGMENTATIONS, f"must be one of {known}")
        once = self.labels is None or len(set(self.labels)) == len(self.labels)
        require(self, "labels", once, "names one twice")

    @property
    def peak_learning_rate(self) -> float:
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate


@dataclass
class InspectOptions(WhatTheModelSees):
    """Show what is in a data folder before anyone trains on it, and what the model would be given."""

    dataset: str = option("own", "The dataset, as of train.py.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    intensity: str = option("auto", f"How values become grey: {FORMS}.")
    offset: str = option("auto", f"What CT's values were stored with: {OFFSETS}.")
    plane: str = option("axial", f"Of volumes, by their orientation in space: {', '.join(PLANES)}.")
    resample_masks: bool = option(False, "Bring a mask on another grid to its image's, by the nearest voxel.")
    image_size: int = option(128, "Side of the model's square, in pixels.")
    fit: str = option("stretch", "stretch or pad, as of train.py.")
    tile: int | None = option(None, "Side of crops, as of train.py.")
    sheet: str | None = option(None, "File for a picture of some images of each split with their masks.")
    json: str | None = option(None, "File for all that is counted, as JSON.")
    dump: str | None = option(
        None, "Folder for what is read: SPLIT/NAME.npz with image (H, W, 3), masks (K, H, W) and labels."
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_reading(self)
        require(self, "fit", self.fit in FITS, f"must be {' or '.join(FITS)}")
        require_folder_to_be(self, "dump")
        for name in ("sheet", "json"):
            require_file_to_be(self, name)


def check_reading(options: Any) -> None:
    parse_intensity(options.intensity)
    check_offset(options.offset)
    require(options, "plane", options.plane in (*PLANES, STORED), f"must be one of {', '.join(PLANES)}")


@dataclass
class CompareOptions(TrainOptions):
    """Train and evaluate several methods alike, and write one report."""

    output_dir: str = option("runs/comparison", "Where the runs and the report go.")
    methods: str = option(
        "s-sam,lora", "The methods, with commas between them; the first is what the others are compared with."
    )
    seeds: int = option(3, "How many seeds, from 0.")
    folds: int | None = option(None, "How many folds, if `dataset` holds {fold}, which counts from 1.")
    rate_factors: str = option(
        "0.33,1,3",
        "Learning rates to choose from on validation, as multiples of the method's own; with commas between them.",
    )
    jobs: int = option(1, "Runs at a time, which share the cores.")
    examples: int = option(4, "Test images in the picture of all methods' masks.")
    report: str | None = option(
        None,
        "Folder of a report, whose README.md, table and figures are written again from its own runs.csv, "
        "scores.csv.gz, history.csv.gz and report.json; nothing is trained, and no other option goes with it.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, instead in (("method", "methods"), ("seed", "seeds"), ("learning_rate", "rate_factors")):
            is_default = getattr(self, name) == getattr(type(self), name)
            require(self, name, is_default, f"is set for each run; give {instead} in its place")
        for method in self.method_names:
            if method not in METHODS:
                raise UserError(f"methods names {method!r}, but the methods are {', '.join(METHODS)}.")
        require(self, "methods", len(set(self.method_names)) == len(self.method_names), "names one twice")
        require(self, "folds", (self.folds is not None) == ("{fold}" in self.dataset), "goes with {fold} in dataset")
        try:
            positive = all(0 < factor <= LARGEST_FACTOR for factor in self.factors)
        except ValueError:
            positive = False
        require(self, "rate_factors", positive, "must be numbers above 0 with commas between them")
        alone = self.report is None or list(changed_options(self)) == ["report"]
        require(self, "report", alone, "is written again from what is in it; leave the other options out")

    @property
    def method_names(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",")]

    @property
    def factors(self) -> list[float]:
        return [float(factor) for factor in self.rate_factors.split(",")]


@dataclass
class EvaluateOptions:
    """Score a trained adapter on one split of its dataset."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    dataset: str | None = option(None, "The dataset to read; by default the one the adapter was trained on.")
    resample_masks: bool = option(False, "Bring a mask on another grid to its image's, by the nearest voxel.")
    split: str = option("test", "The split to score.")
    output: str | None = option(None, "File for the scores, as JSON.")
    csv: str | None = option(None, "File for the table, as CSV.")
    markdown: str | None = option(None, "File for the table, as Markdown.")
    scores: str | None = option(None, "File for the scores of each image and label, as CSV.")
    against: str | None = option(
        None, "Another method's scores of each image, its run's scores.csv, to test the difference."
    )
    overlays: str | None = option(None, "Folder for pictures of the images with true and predicted masks.")
    backbone: str | None = option(None, "Where the pretrained weights are, if not where the adapter was trained.")
    batch_size: int = option(4, "Images a step.")

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        for name in ("output", "csv", "markdown", "scores"):
            require_file_to_be(self, name)
        require_folder_to_be(self, "overlays")


@dataclass
class PredictOptions:
    """Segment images of one's own by the names of the labels."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    images: str = option("", "An image, a volume, a DICOM series, or a folder of them and of folders.")
    output: str = option("", "Folder for the masks, in a sub-folder a label.")
    threshold: float = option(0.5, "Probability above which a pixel belongs to a label.")
    largest_component: bool = option(False, "Keep of each label only the largest connected part.")
    probabilities: bool = option(False, "Write each label's probabilities, too.")
    report: str | None = option(None, "File for what was found in each image, as JSON.")
    backbone: str | None = option(None, "Where the pretrained weights are, if not where the adapter was trained.")
    batch_size: int = option(4, "Images a step.")

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        require(self, "images", bool(self.images), "must be given, an image or a folder of images")
        require(self, "threshold", 0 < self.threshold < 1, "must be between 0 and 1")
        require(self, "output", bool(self.output), "must be given, a folder for the masks")
        require_folder_to_be(self, "output")
        require_file_to_be(self, "report")


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
    options = options_type(**namespace)
    check_values(options)
    return options


def flags_of(values: dict[str, Any]) -> list[str]:
    """Option names and values as the command line takes them; None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def changed_options(options: Any) -> dict[str, Any]:
    """Those that are not at their defaults."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(type(options), name)}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(
            f"{message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + '...'}; see --help."
        )


class _Loader(yaml.SafeLoader):
    """YAML without references, by which a few lines can stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("it refers to another place in the file with *, which options have no use for")
        return super().compose_node(parent, index)


def _read_yaml(path: Path, options_type: type, parser: HfArgumentParser) -> dict[str, Any]:
    """The file's options, each checked and converted as if it had been given as a flag."""
    content = _load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines of the form `key: value`.")
    names = [f.name for f in fields(cast(Any, options_type))]
    unknown = [shortened(key) for key in content if key not in names]
    if unknown:
        raise UserError(f"{path} has the unknown key {unknown[0]}; the keys are {', '.join(names)}.")
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, PLAIN) for one in values) or (isinstance(value, list) and None in value):
            raise UserError(f"{path}: {key} must be one value or a list of values.")
    try:
        parsed = vars(parser.parse_args(flags_of(content)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {key: parsed[key] for key in content}


def _load_yaml(path: Path) -> Any:
    try:
        with path.expanduser().open("rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise UserError(f"{path} has more than {LARGEST_CONFIG} bytes; give a file of options.")
        return yaml.load(text.decode(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep; it must hold lines of the form `key: value`.") from error
    # Values that look like a date or a number and are none end in errors of Python's own.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:LONGEST_MESSAGE]}") from error


def check_values(options: Any) -> None:
    """What holds for every option of a name or type; ``~`` in a path becomes the home folder.

    Raises:
        UserError: for a number out of its range or none, an empty or overlong text, or a path that cannot be.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None or (value == f.default and not isinstance(value, float)):
            continue
        if f.name in PATHS or (f.name == "overlays" and isinstance(value, str)):
            if reason := why_not_a_path(value):
                raise UserError(f"{f.name} is {shortened(value)}, which {reason}.")
            setattr(options, f.name, os.path.expanduser(value))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                fits = bool(text.strip()) and len(text) <= LONGEST_TEXT and "\0" not in text
                require(options, f.name, fits, f"must be a text of 1 to {LONGEST_TEXT} characters")
        if f.name in LIMITS and not isinstance(value, str):
            _check_number(options, f.name, value)


def _check_number(options: object, name: str, value: float) -> None:
    least, most = LIMITS[name]
    if name in ABOVE_ZERO:
        require(options, name, value > 0, "must be above 0")
    require(options, name, not value < least, f"must be at least {least}" if least else "must not be negative")
    require(options, name, value <= most, f"must be a number of at most {most}")


def require_file_to_be(options: object, name: str) -> None:
    """Raises a `UserError` if the option's file cannot be written."""
    path = getattr(options, name)
    reason = None if path is None else why_no_file(Path(path))
    require(options, name, reason is None, f"must be a file, in a folder or one that can be made ({reason})")


def require_folder_to_be(options: object, name: str) -> None:
    """Raises a `UserError` if the option's folder can be neither made nor written."""
    path = getattr(options, name)
    reason = None if path is None else why_no_folder(Path(path))
    require(options, name, reason is None, f"must be a folder, or one that can be made ({reason})")


def require(options: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} is {shortened(getattr(options, name))}, but it {rule}.")
