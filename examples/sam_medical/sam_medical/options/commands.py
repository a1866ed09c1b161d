"""The options of each command, composed of the groups that it uses."""

from __future__ import annotations

from dataclasses import dataclass

from sam_medical.common.errors import UserError
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
    """Train S-SAM, or another method, on a folder of images and masks."""

    method: str = option("s-sam", f"How to train: {', '.join(METHODS)}; or package.module:NAME.", METHODS)
    fold: int | None = option(None, "The fold to train on, from 1, of a dataset that has folds.")
    learning_rate: float | None = option(None, "Peak learning rate; by default the method's, 5e-3 for S-SAM.")
    seed: int = option(0, "Seed of the initialisation, the order of the images and their augmentation.")
    resume: bool = option(False, "Go on where an interrupted run in output_dir stopped; start anew if there is none.")
    overwrite: bool = option(False, "Replace a finished run in output_dir.")

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # which checks how files are read
        require(self, "method", self.method in METHODS, f"must be one of {', '.join(METHODS)}")
        check_method(self, self.method)

    @property
    def peak_learning_rate(self) -> float:
        return METHODS[self.method].learning_rate if self.learning_rate is None else self.learning_rate


@dataclass
class CompareOptions(ExtensionOptions, RunOptions, ValidationOptions, OptimOptions, ModelOptions, DataOptions):
    """Train and evaluate several methods alike, and write one report."""

    output_dir: str = option("runs/comparison", "Folder for the runs and the report.")
    methods: str = option(
        "s-sam,lora",
        "The methods, with commas between them; the first is the one that the others are compared with.",
        METHODS,
    )
    seeds: int = option(3, "Number of seeds, from 0.")
    folds: int | None = option(None, "Number of folds, from 1, of a dataset that has folds.")
    rate_factors: str = option(
        "0.33,1,3",
        "Learning rates to choose from on validation, as multiples of the method's own, with commas between them.",
    )
    jobs: int = option(1, "Runs at a time, which share the cores.")
    examples: int = option(4, "Test images in the picture of all methods' masks.")
    report: str | None = option(
        None,
        "Folder of a report. Its README.md, table and figures are written again from its own runs.csv, "
        "scores.csv.gz, history.csv.gz and report.json. Nothing is trained, and of the other options only "
        "--extensions goes with it.",
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # which checks how files are read
        for method in self.method_names:
            if method not in METHODS:
                raise UserError(f"methods names {method!r}, but the methods are {', '.join(METHODS)}.")
        require(self, "methods", len(set(self.method_names)) == len(self.method_names), "names one twice")
        if "{fold}" in self.dataset:  # as older versions named the folds
            require(self, "folds", self.folds is not None, "must be given with {fold} in dataset")
        try:
            positive = all(0 < factor <= LARGEST_FACTOR for factor in self.factors)
        except ValueError:
            positive = False
        require(self, "rate_factors", positive, "must be numbers above 0 with commas between them")
        alone = self.report is None or changed_options(self).keys() <= {"report", "extensions"}
        require(self, "report", alone, "is written again from what is in it; leave the other options out")

    @property
    def method_names(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",")]

    @property
    def factors(self) -> list[float]:
        return [float(factor) for factor in self.rate_factors.split(",")]


@dataclass
class InspectOptions(FramingOptions, DataOptions, ExtensionOptions):
    """Show what is in a data folder before anyone trains on it, and what the model would be given."""

    dataset: str = option("own", DATASET_HELP, DATASETS)
    fold: int | None = option(None, "The fold to show, from 1, of a dataset that has folds.")
    sheet: str | None = option(None, "File for a picture of some images of each split with their masks.")
    json: str | None = option(None, "File for all that is counted, as JSON.")
    dump: str | None = option(
        None, "Folder for what is read: SPLIT/NAME.npz with image (H, W, 3), masks (K, H, W) and labels."
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.reading  # which checks how files are read
        require(
            self, "dataset", dataset_and_fold(self.dataset)[0] in DATASETS, f"must be one of {', '.join(DATASETS)}"
        )
        require_folder_to_be(self, "dump")
        for name in ("sheet", "json"):
            require_file_to_be(self, name)


@dataclass
class EvaluateOptions(ExtensionOptions):
    """Score a trained adapter on one split of its dataset."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    dataset: str | None = option(
        None, "The dataset to read; by default the one that the adapter was trained on.", DATASETS
    )
    fold: int | None = option(None, "The fold to read; by default the one that the adapter was trained on.")
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
    backbone: str | None = option(
        None, "Where the pretrained weights are, if not where the adapter was trained.", BACKBONES
    )
    batch_size: int = option(4, "Images per step.")

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        for name in ("output", "csv", "markdown", "scores"):
            require_file_to_be(self, name)
        require_folder_to_be(self, "overlays")


@dataclass
class PredictOptions(ExtensionOptions):
    """Segment images of one's own by the names of the labels."""

    adapter: str = option("", "Folder of the adapter, RUN/adapter.")
    images: str = option("", "An image, a volume, a DICOM series, or a folder of them and of folders.")
    output: str = option("", "Folder for the masks, in a sub-folder per label.")
    threshold: float = option(0.5, "Probability above which a pixel belongs to a label.")
    largest_component: bool = option(False, "Keep only the largest connected part of each label.")
    probabilities: bool = option(False, "Write each label's probabilities, too.")
    report: str | None = option(None, "File for what was found in each image, as JSON.")
    backbone: str | None = option(
        None, "Where the pretrained weights are, if not where the adapter was trained.", BACKBONES
    )
    batch_size: int = option(4, "Images per step.")

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "adapter", bool(self.adapter), "must be given, the folder RUN/adapter that train.py wrote")
        require(self, "images", bool(self.images), "must be given, an image or a folder of images")
        require(self, "threshold", 0 < self.threshold < 1, "must be between 0 and 1")
        require(self, "output", bool(self.output), "must be given, a folder for the masks")
        require_folder_to_be(self, "output")
        require_file_to_be(self, "report")


def check_method(options: ModelOptions, name: str) -> None:
    """Raises a `UserError` if an option has no meaning for the method."""
    method = METHODS[name]
    whole = options.tile is None or not method.needs_expert
    require(options, "tile", whole, f"has no meaning for {method.title}, which sees the whole image")
    if options.prompt == "learned":
        require(options, "prompt", method.needs_text, f"has no meaning for {method.title}; leave it out")
