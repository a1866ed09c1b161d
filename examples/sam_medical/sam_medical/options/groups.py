"""Groups of options that several commands share. A command's options are the groups that it uses, and its own."""

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

DATASET_HELP = f"One of {', '.join(DATASETS)}; own is a folder of images and masks; or package.module:CLASS."


def option(default: Any, help: str, registry: Registry | None = None) -> Any:
    """A dataclass's field with its help.

    Args:
        default: Its value where none is given.
        help: What it is, as ``--help`` says it.
        registry: Where its value is found by name; ``package.module:NAME`` is imported if it was typed.
    """
    return field(default=default, metadata={"help": help, "registry": registry})


@dataclass
class ExtensionOptions:
    """Code of the user's own."""

    extensions: list[str] | None = option(
        None, "Modules of your own, imported first; they may add datasets, methods and backbones."
    )


@dataclass
class DataOptions:
    """Which images there are, and how their files are read."""

    dataset: str = option("brain-mri", DATASET_HELP + " brain-mri needs no files.", DATASETS)
    data_root: str | None = option(None, "Folder of the dataset's files.")
    labels: list[str] | None = option(None, "Labels to segment, with spaces between them; by default all.")
    intensity: str = option(
        "auto",
        f"How values become grey: {INTENSITY_FORMS}. auto leaves eight bits as they are, gives CT the soft-tissue "
        "window, and other deep images percentiles of what is not background.",
    )
    offset: str = option(
        "auto",
        f"What CT's values were stored with, in files without negative ones: {OFFSET_FORMS}; auto looks at many.",
    )
    plane: Plane = option("axial", "The plane in which volumes are cut into slices, by their orientation in space.")
    resample_masks: bool = option(False, "Bring a mask on another grid to its image's, by the nearest voxel.")

    @property
    def reading(self) -> Reading:
        from sam_medical.data.reading import Reading

        return Reading(self.intensity, self.plane, self.resample_masks, offset=self.offset)


@dataclass
class FramingOptions:
    """How an image becomes the model's square."""

    image_size: int = option(128, "Side of the square that images are resized to, in pixels.")
    fit: Fit = option("stretch", "stretch images to the square, or pad them, which keeps their aspect.")
    tile: int | None = option(
        None, "Side of crops in pixels: train on them, and segment by a sliding window, instead of whole images."
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
        "lite-medsam; hub name or folder of a SamModel; a segment-anything .pth file; or package.module:CLASS.",
        BACKBONES,
    )
    text_encoder: str = option("minilm", "minilm; or hub name or folder of a CLIP, as openai/clip-vit-base-patch32.")


@dataclass
class PromptOptions:
    """What prompts a model, and which of its layers are tuned."""

    prompt: Prompt = option("text", "text; or learned, a token per label for names that no text encoder tells apart.")
    target_modules: str | None = option(
        None, "Regular expression of the layers to tune; by default all linear layers of the encoder and its neck."
    )


@dataclass
class ModelOptions(PromptOptions, FramingOptions, BaseModelOptions):
    """What the model is built of, and what it sees."""


@dataclass
class OptimOptions:
    """How a model learns."""

    steps: int = option(400, "Updates of the adapter.")
    batch_size: int = option(4, "Images per step and process.")
    gradient_accumulation_steps: int = option(1, "Batches that make one update.")
    value_rate: float = option(5.0, "Learning rate of A and B, as a multiple of the others'.")
    warmup_steps: int = option(20, "Updates over which the learning rate rises, before it falls along a cosine.")
    weight_decay: float = option(
        0.01, "AdamW's decay of matrices that learn; of S-SAM, the text affine layer's alone."
    )
    focal_weight: float = option(20.0, "Weight of the focal loss beside the Dice loss.")
    augmentation: Augmentation = option("upright", "Random views of the training images.")
    mixed_precision: Precision = option("no", "Precision of the products.")
    gradient_checkpointing: bool = option(
        False, "Compute the encoder's blocks again in the backward pass instead of keeping their activations."
    )
    compile: bool = option(
        False, "Compile the model with torch.compile; the first steps take longer, the others less."
    )
    num_workers: int = option(0, "Processes that read and augment images.")


@dataclass
class ValidationOptions:
    """When a model is validated, by which images and which score."""

    validate_every: int = option(50, "Updates between two validations, after each of which the state is saved.")
    validation_images: int | None = option(
        None, "Validate on this many images, evenly from the first to the last; by default on all."
    )
    choose_by: Criterion = option(
        "pooled-dice",
        "The Dice on validation that chooses the best adapter: pooled-dice, of each label's pixels together; or dice, "
        "the paper's, to which predicting nothing looks good where labels are rare.",
    )
    overlays: int = option(6, "Test images drawn with their true and predicted masks.")


@dataclass
class RunOptions:
    """Where a run leaves its files, and who is told of it."""

    output_dir: str = option("runs/ssam", "Folder for the adapter, metrics, curves and overlays.")
    report_to: str | None = option(
        None, "A tracker that accelerate knows, such as tensorboard, beside the run's files."
    )
