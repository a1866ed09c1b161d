"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sam_medical.common.choices import (
    INTENSITY_FORMS,
    OFFSET_FORMS,
    Augmentation,
    Criterion,
    Fit,
    Plane,
    Precision,
    Prompt,
)
from sam_medical.common.registry import Registry
from sam_medical.data import DATASETS
from sam_medical.models import BACKBONES

if TYPE_CHECKING:
    from sam_medical.data.loading import Framing
    from sam_medical.data.reading import Reading

DATASET_HELP = f"One of {', '.join(DATASETS)}, or package.module:CLASS. own is your own folder of images and masks."


def option(default: Any, help: str, registry: Registry | None = None) -> Any:
    """Returns a dataclass field for an option.

    Args:
        default: The default value.
        help: The text of ``--help``.
        registry: The registry of the option's values. If the user types ``package.module:NAME``, it is imported.
    """
    return field(default=default, metadata={"help": help, "registry": registry})


@dataclass
class ExtensionOptions:
    """The user's own code."""

    extensions: list[str] | None = option(
        None, "Your own modules. They are imported first, and may register datasets, methods and backbones."
    )


@dataclass
class DataOptions:
    """The images, and how their files are read."""

    dataset: str = option("brain-mri", DATASET_HELP + " brain-mri needs no files.", DATASETS)
    data_root: str | None = option(None, "Folder with the files of the dataset.")
    labels: list[str] | None = option(None, "Labels to segment, separated by spaces. The default is all labels.")
    intensity: str = option(
        "auto",
        f"Mapping of intensities to grey: {INTENSITY_FORMS}. auto keeps 8-bit values, uses the soft-tissue window for "
        "CT, and percentiles of the foreground for all other images.",
    )
    offset: str = option(
        "auto",
        f"Offset of CT values in files without negative values: {OFFSET_FORMS}. auto infers it from many images.",
    )
    plane: Plane = option(
        "axial", "Anatomical plane of the slices of a volume. stored uses the last axis of the file."
    )
    resample_masks: bool = option(
        False, "Resample masks on another grid to the grid of their image (nearest neighbour)."
    )

    @property
    def reading(self) -> Reading:
        from sam_medical.data.reading import Reading

        return Reading(self.intensity, self.plane, self.resample_masks, offset=self.offset)


@dataclass
class FramingOptions:
    """How images are mapped to the model's square input."""

    image_size: int = option(128, "Side of the model's square input, in pixels.")
    fit: Fit = option("stretch", "stretch images to the square, or pad them to keep their aspect ratio.")
    tile: int | None = option(
        None, "Side of training crops and of the sliding window, in image pixels. The default is the whole image."
    )

    @property
    def framing(self) -> Framing:
        from sam_medical.data.loading import Framing

        return Framing(self.image_size, self.fit, self.tile)


@dataclass
class BaseModelOptions:
    """The pretrained parts of a model."""

    backbone: str = option(
        "lite-medsam",
        "lite-medsam; Hub name or folder of a SamModel; a segment-anything .pth file; or package.module:CLASS.",
        BACKBONES,
    )
    text_encoder: str = option(
        "minilm", "minilm; or Hub name or folder of a CLIP, such as openai/clip-vit-base-patch32."
    )


@dataclass
class PromptOptions:
    """The prompts of a model, and its tuned layers."""

    prompt: Prompt = option(
        "text",
        "text embeddings of the label names; or learned, one token per label, for names that no text encoder knows.",
    )
    target_modules: str | None = option(
        None, "Regular expression of the layers to tune. The default is all linear layers of the encoder and its neck."
    )


@dataclass
class ModelOptions(PromptOptions, FramingOptions, BaseModelOptions):
    """The parts of the model, and its input."""


@dataclass
class OptimOptions:
    """Optimisation."""

    steps: int = option(400, "Number of optimizer updates.")
    batch_size: int = option(4, "Images per batch and process.")
    gradient_accumulation_steps: int = option(1, "Batches per update.")
    value_rate: float = option(
        5.0, "Learning rate of the singular-value parameters A and B, as a multiple of learning_rate."
    )
    warmup_steps: int = option(20, "Updates of linear learning-rate warmup, followed by cosine decay.")
    weight_decay: float = option(
        0.01, "Weight decay of AdamW for trained matrices. For S-SAM, this is the text affine layer only."
    )
    focal_weight: float = option(20.0, "Weight of the focal loss, relative to the Dice loss.")
    augmentation: Augmentation = option("upright", "Augmentation of the training images.")
    mixed_precision: Precision = option("no", "Mixed precision of accelerate.")
    gradient_checkpointing: bool = option(
        False, "Save memory: recompute the activations of the encoder's blocks in the backward pass."
    )
    compile: bool = option(
        False, "Compile the model with torch.compile. The first steps are slower, the others faster."
    )
    num_workers: int = option(0, "Worker processes that read and augment images.")


@dataclass
class ValidationOptions:
    """Validation: how often, on which images, and by which score."""

    validate_every: int = option(50, "Updates between validations. The state is saved after each of them.")
    validation_images: int | None = option(
        None, "Number of validation images, evenly spaced over the split. The default is all."
    )
    choose_by: Criterion = option(
        "pooled-dice",
        "Validation score that chooses the best adapter. pooled-dice pools all images' pixels per label. dice is "
        "the paper's mean over images, which rewards empty predictions of rare labels.",
    )
    overlays: int = option(6, "Number of test images to draw with their true and predicted masks.")


@dataclass
class RunOptions:
    """The output of a run."""

    output_dir: str = option("runs/ssam", "Output folder for the adapter, metrics, curves and overlays.")
    report_to: str | None = option(None, "Tracker of accelerate, such as tensorboard, in addition to the run's files.")
