"""What a folder of images and masks comes to, whichever its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sam_medical.data.annotations import Annotation
from sam_medical.data.decoding import EXTENSIONS
from sam_medical.data.sources import Source, folders_in

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages")
MASK_FOLDERS = (
    "1st_manual",  # before mask, which in DRIVE is what the camera sees
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
    image: Source
    annotation: Annotation


@dataclass
class Part:
    """What a folder holds: all images, or those of one split.

    Attributes:
        labels: Their names.
        pairs: The images with what is in them.
        notes: What a person should know of what was found.
        modality: What the images are, where a file says so.
        folder: Where the images are.
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
    """On folders that are called as if they held masks, beside the one that is taken for it."""
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
