"""The result of reading a folder of images and masks, the same for all layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sam_medical.data.annotations import Annotation
from sam_medical.data.decoding import EXTENSIONS
from sam_medical.data.sources import Source, folders_in

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages")
MASK_FOLDERS = (
    "1st_manual",  # first, because DRIVE's folder mask contains the field of view
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "segmentations",
    "segmentation",
    "ground_truth",
    "groundtruth",
    "gt",
    "segmentationclass",
    "ann_dir",
)
NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Pair:
    """An image and its annotation."""

    image: Source
    annotation: Annotation


@dataclass
class Part:
    """The images of a folder: all of them, or those of one split.

    Attributes:
        labels: The names of the labels.
        pairs: The images with their annotations.
        notes: Messages to the user about the files found.
        modality: The modality of the images, such as CT, if a file states it.
        folder: The folder of the images.
    """

    labels: Sequence[str]
    pairs: list[Pair]
    notes: list[str] = field(default_factory=list)
    modality: str = ""
    folder: Path = Path()


def folder_named(folder: Path, names: Sequence[str]) -> Path | None:
    if not folder.is_dir():
        return None
    folders = {path.name.lower(): path for path in folders_in(folder)}
    return next((folders[name] for name in names if name in folders), None)


def notes_on_other_masks(folder: Path, taken: Path) -> list[str]:
    """Returns notes on further folders with the name of a mask folder, besides the one in use."""
    others = [path.name for path in folders_in(folder) if path.name.lower() in MASK_FOLDERS and path != taken]
    return [f"masks are those of {taken.name}; left out is {', '.join(others)} beside it"] if others else []


def notes_on(unknown: Sequence[Path]) -> list[str]:
    if not unknown:
        return []
    names = ", ".join(path.name for path in unknown[:NAMED_AT_MOST]) + (
        " and others" if len(unknown) > NAMED_AT_MOST else ""
    )
    return [f"{len(unknown)} files in {unknown[0].parent} are not read: {names}; images are {', '.join(EXTENSIONS)}"]


def notes_on_unused(masks: Sequence[Source], used: set[str]) -> list[str]:
    unused = [mask for mask in masks if mask.key not in used]
    return [f"{len(unused)} masks belong to no image, first {unused[0].path}"] if unused else []
