"""The options of each command, composed of groups."""

from __future__ import annotations

from dataclasses import dataclass

from sam_medical.common.errors import UserError
from sam_medical.common.registry import is_place
from sam_medical.data import DATASETS, dataset_and_fold
from sam_medical.methods import METHODS
from sam_medical.models import BACKBONES
from sam_medical.options.checks import check_values, require, require_file_to_be, require_folder_to_be
from sam_medical.options.groups import (
    DATASET_HELP,
    DataOptions,
    ExtensionOptions,
    FramingOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    ValidationOptions,
    option,
)
from sam_medical.options.parsing import changed_options

LARGEST_FACTOR = 1e6


@dataclass
class TrainOptions(ExtensionOptions, RunOptions, ValidationOptions, OptimOptions, ModelOptions, DataOptions):
    """Train S-SAM or another method on images and masks."""

    method: str = option("s-sam", f"Training method: {', '.join(METHODS)}; or package.module:NAME.", METHODS)
    fold: int | None = option(None, "Fold to train on, starting at 1, if the dataset has folds.")
    learning_rate: float | None = option(
        None, "Peak learning rate. The default depends on the method and is 5e-3 for S-SAM."
    )
    seed: int = option(0, "Random seed for initialisation, image order and augmentation.")
    resume: bool = option(False, "Continue an interrupted run in output_dir, or start a new one if there is none.")
    overwrite: bool = option(False, "Replace a finished run in output_dir.")

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # validates intensity, offset and plane
        if self.method not in METHODS and is_place(self.method):
            raise UserError(METHODS.unknown(self.method))
        require(self, "method", self.method in METHODS, f"must be one of {', '.join(METHODS)}")
        check_method(self, self.method)

    @property
    def peak_learning_rate(self) -> float:
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate


@dataclass
class CompareOptions(ExtensionOptions, RunOptions, ValidationOptions, OptimOptions, ModelOptions, DataOptions):
    """Train and evaluate several methods under equal conditions, and write one report."""

    output_dir: str = option("runs/comparison", "Folder for the runs and the report.")
    methods: str = option(
        "s-sam,lora",
        "Comma-separated methods. The others are compared with the first one.",
        METHODS,
    )
    seeds: int = option(3, "Number of seeds, starting at seed 0.")
    folds: int | None = option(None, "Number of folds, starting at fold 1, if the dataset has folds.")
    rate_factors: str = option(
        "0.33,1,3",
        "Comma-separated learning rates to try, as multiples of the method's default. Validation chooses the best.",
    )
    jobs: int = option(1, "Number of parallel runs. They share the CPU cores.")
    examples: int = option(4, "Number of test images in the figure of all methods' masks.")
    report: str | None = option(
        None,
        "Folder of an existing report. Rewrites its README.md, table and figures from its runs.csv, "
        "scores.csv.gz, history.csv.gz and report.json, and trains nothing. Only --extensions can be combined "
        "with it.",
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # validates intensity, offset and plane
        for method in self.method_names:
            if method not in METHODS:
                raise UserError(f"methods names {method!r}, but the methods are {', '.join(METHODS)}.")
        require(self, "methods", len(set(self.method_names)) == len(self.method_names), "names one twice")
        if "{fold}" in self.dataset:  # the notation of older versions
            require(self, "folds", self.folds is not None, "must be given with {fold} in dataset")
        try:
            positive = all(0 < factor <= LARGEST_FACTOR for factor in self.factors)
        except ValueError:
            positive = False
        require(self, "rate_factors", positive, "must be numbers above 0 with commas between them")
        alone = self.report is None or changed_options(self).keys() <= {"report", "extensions"}
        require(self, "report", alone, "is rewritten from its own files; leave the other options out")

    @property
    def method_names(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",")]

    @property
    def factors(self) -> list[float]:
        return [float(factor) for factor in self.rate_factors.split(",")]


@dataclass
class InspectOptions(FramingOptions, DataOptions, ExtensionOptions):
    """Show the content of a data folder, and the model's input, before training."""

    dataset: str = option("own", DATASET_HELP, DATASETS)
    fold: int | None = option(None, "Fold to show, starting at 1, if the dataset has folds.")
    sheet: str | None = option(None, "Output PNG file: a contact sheet of some images per split with their masks.")
    json: str | None = option(None, "Output JSON file with all statistics.")
    dump: str | None = option(
        None, "Output folder for all samples: SPLIT/NAME.npz with image (H, W, 3), masks (K, H, W) and labels."
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # validates intensity, offset and plane
        require(
            self, "dataset", dataset_and_fold(self.dataset)[0] in DATASETS, f"must be one of {', '.join(DATASETS)}"
        )
        require_folder_to_be(self, "dump")
        for name in ("sheet", "json"):
            require_file_to_be(self, name)


@dataclass
class AdapterOptions(ExtensionOptions):
    """The adapter that a command uses."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    backbone: str | None = option(
        None, "Pretrained weights, if they have moved since the adapter was trained.", BACKBONES
    )
    batch_size: int = option(4, "Images per batch.")

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")


@dataclass
class EvaluateOptions(AdapterOptions):
    """Score a trained adapter on one split of its dataset."""

    data_root: str | None = option(None, "Folder with the files of the dataset.")
    dataset: str | None = option(
        None, "Dataset to score. The default is the dataset that the adapter was trained on.", DATASETS
    )
    fold: int | None = option(None, "Fold to score. The default is the fold that the adapter was trained on.")
    resample_masks: bool = option(
        False, "Resample masks on another grid to the grid of their image (nearest neighbour)."
    )
    split: str = option("test", "Split to score.")
    output: str | None = option(None, "Output JSON file with the scores.")
    csv: str | None = option(None, "Output CSV file with the table.")
    markdown: str | None = option(None, "Output Markdown file with the table.")
    scores: str | None = option(None, "Output CSV file with the scores per image and label.")
    against: str | None = option(
        None, "The scores.csv of another run on the same split. Tests the difference of the two methods."
    )
    overlays: str | None = option(None, "Output folder for figures of the images with true and predicted masks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("output", "csv", "markdown", "scores"):
            require_file_to_be(self, name)
        require_folder_to_be(self, "overlays")


@dataclass
class PredictOptions(AdapterOptions):
    """Segment your own images with a trained adapter."""

    images: str = option("", "An image, volume or DICOM series; or a folder, which is searched recursively.")
    output: str = option("", "Output folder for the masks, with one sub-folder per label.")
    threshold: float = option(0.5, "Probability above which a pixel belongs to a label.")
    largest_component: bool = option(False, "Keep only the largest connected component of each label.")
    probabilities: bool = option(False, "Also write the probabilities of each label.")
    report: str | None = option(None, "Output JSON file with the measurements of each image.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "images", bool(self.images), "must be given, an image or a folder of images")
        require(self, "threshold", 0 < self.threshold < 1, "must be between 0 and 1")
        require(self, "output", bool(self.output), "must be given, a folder for the masks")
        require_folder_to_be(self, "output")
        require_file_to_be(self, "report")


def check_method(options: ModelOptions, name: str) -> None:
    """Raises a `UserError` if an option does not apply to the method."""
    method = METHODS[name]
    whole = options.tile is None or not method.needs_expert
    require(options, "tile", whole, f"has no meaning for {method.title}, which sees the whole image")
    if options.prompt == "learned":
        require(options, "prompt", method.needs_text, f"has no meaning for {method.title}; leave it out")
