"""One dataclass a command: its fields are the keys of the YAML file and the flags of the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from ssam.data.augmentation import AUGMENTATIONS
from ssam.data.geometry import PLANES, STORED
from ssam.data.intensity import FORMS, parse_intensity
from ssam.data.loading import FITS, LEAST_TILE, Framing
from ssam.data.reading import Reading
from ssam.errors import UserError
from ssam.methods import METHODS
from ssam.metrics import CRITERIA
from ssam.prompts import PROMPTS

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainOptions:
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
        for name in ("image_size", "steps", "batch_size", "gradient_accumulation_steps", "validate_every"):
            require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("warmup_steps", "num_workers", "overlays", "weight_decay", "focal_weight", "seed"):
            require(self, name, getattr(self, name) >= 0, "must not be negative")
        check_reading(self)
        require(self, "fit", self.fit in FITS, f"must be {' or '.join(FITS)}")
        require(self, "prompt", self.prompt in PROMPTS, f"must be {' or '.join(PROMPTS)}")
        require(self, "tile", self.tile is None or self.tile >= LEAST_TILE, f"must be at least {LEAST_TILE}")
        some = self.validation_images is None or self.validation_images >= 1
        require(self, "validation_images", some, "must be at least 1")
        require(self, "method", self.method in METHODS, f"must be one of {', '.join(METHODS)}")
        whole = self.tile is None or not METHODS[self.method].needs_expert
        require(self, "tile", whole, f"has no meaning for {METHODS[self.method].title}, which sees the whole image")
        if self.prompt == "learned":
            prompted = METHODS[self.method].needs_text
            require(self, "prompt", prompted, f"has no meaning for {METHODS[self.method].title}; leave it out")
        require(self, "learning_rate", self.peak_learning_rate > 0, "must be above 0")
        require(self, "value_rate", self.value_rate > 0, "must be above 0")
        require(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "must be no, bf16 or fp16")
        require(self, "choose_by", self.choose_by in CRITERIA, f"must be one of {', '.join(CRITERIA)}")
        known = ", ".join(AUGMENTATIONS)
        require(self, "augmentation", self.augmentation in AUGMENTATIONS, f"must be one of {known}")

    @property
    def peak_learning_rate(self) -> float:
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def reading(self) -> Reading:
        return Reading(self.intensity, self.plane, self.resample_masks)

    @property
    def framing(self) -> Framing:
        return Framing(self.image_size, self.fit, self.tile)


@dataclass
class InspectOptions:
    """Show what is in a data folder before anyone trains on it, and what the model would be given."""

    dataset: str = option("own", "The dataset, as of train.py.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    intensity: str = option("auto", f"How values become grey: {FORMS}.")
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
        check_reading(self)
        require(self, "image_size", self.image_size >= 1, "must be at least 1")
        require(self, "fit", self.fit in FITS, f"must be {' or '.join(FITS)}")
        require(self, "tile", self.tile is None or self.tile >= LEAST_TILE, f"must be at least {LEAST_TILE}")
        _require_folder_to_be(self, "dump")

    @property
    def reading(self) -> Reading:
        return Reading(self.intensity, self.plane, self.resample_masks)

    @property
    def framing(self) -> Framing:
        return Framing(self.image_size, self.fit, self.tile)


def check_reading(options: Any) -> None:
    parse_intensity(options.intensity)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "jobs", "examples"):
            require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for name, instead in (("method", "methods"), ("seed", "seeds"), ("learning_rate", "rate_factors")):
            is_default = getattr(self, name) == getattr(type(self), name)
            require(self, name, is_default, f"is set for each run; give {instead} in its place")
        for method in self.method_names:
            if method not in METHODS:
                raise UserError(f"methods names {method!r}, but the methods are {', '.join(METHODS)}.")
        require(self, "methods", len(set(self.method_names)) == len(self.method_names), "names one twice")
        require(self, "folds", (self.folds is not None) == ("{fold}" in self.dataset), "goes with {fold} in dataset")
        require(self, "folds", self.folds is None or self.folds >= 1, "must be at least 1")
        try:
            positive = all(factor > 0 for factor in self.factors)
        except ValueError:
            positive = False
        require(self, "rate_factors", positive, "must be numbers above 0 with commas between them")

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
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        require(self, "batch_size", self.batch_size >= 1, "must be at least 1")
        for name in ("output", "csv", "markdown", "scores"):
            path = getattr(self, name)
            can_be = path is None or not (Path(path).is_dir() or _is_below_a_file(Path(path)))
            require(self, name, can_be, "must be a file, in a folder or one that can be made")
        _require_folder_to_be(self, "overlays")


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
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        require(self, "images", bool(self.images), "must be given, an image or a folder of images")
        require(self, "threshold", 0 < self.threshold < 1, "must be between 0 and 1")
        require(self, "output", bool(self.output), "must be given, a folder for the masks")
        _require_folder_to_be(self, "output")
        require(self, "batch_size", self.batch_size >= 1, "must be at least 1")


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
    try:
        parsed = vars(parser.parse_args(flags_of(content)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {key: parsed[key] for key in content}


def _require_folder_to_be(options: object, name: str) -> None:
    path = getattr(options, name)
    can_be = path is None or not (Path(path).is_file() or _is_below_a_file(Path(path)))
    require(options, name, can_be, "must be a folder, or one that can be made")


def _is_below_a_file(path: Path) -> bool:
    return any(parent.is_file() for parent in path.parents)


def require(options: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} is {getattr(options, name)!r}, but it {rule}.")
