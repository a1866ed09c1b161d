"""What every dataset gives: images with one mask a label, the same labels for every image."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ssam.data.nifti import is_volume, read_image_slice, without_suffix
from ssam.errors import UserError, first_line
from ssam.names import why_not_a_folder

EXTENSIONS = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Of ten patients or images in a row, where nobody has split them.
TURNS = {"train": (0, 1, 2, 4, 5, 6, 8), "validation": (3,), "test": (7, 9)}


@dataclass(frozen=True)
class Sample:
    """An image with its masks, at the image's own size.

    Attributes:
        name: Unique within its dataset.
        image: (H, W, 3), float32 between zero and one.
        masks: (K, H, W), bool, in the order of the dataset's labels; a label that is absent has a blank mask.
        group: The patient, volume or video that it is from, whose images resemble each other; none if it stands alone.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    group: str = ""


class SegmentationDataset(ABC):
    """One split of a dataset; ``dataset[i]`` is a `Sample`.

    A reader gives the class attributes ``splits`` and ``labels``, finds its files in ``__init__`` (and complains
    there about what is missing), and reads one image in ``read``.
    """

    splits: ClassVar[tuple[str, ...]]
    labels: Sequence[str]

    def __init__(self, root: Path | None, split: str) -> None:
        self.root = root
        self.split = split
        self._kept: list[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The image with the masks of all the dataset's labels."""

    def keep_labels(self, labels: Sequence[str]) -> None:
        """From now on gives the masks of these labels only, in this order."""
        self._kept = [list(self.labels).index(label) for label in labels]
        self.labels = tuple(labels)

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = self.read(index)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.root}: image {index} of the split {self.split} cannot be read ({first_line(error)})."
            ) from error
        if self._kept is None:
            return sample
        return replace(sample, masks=sample.masks[self._kept])


def require_folder(root: Path | None, dataset: str, holding: str) -> Path:
    """The data folder, or an error that says what it should hold."""
    if root is None:
        raise UserError(f"{dataset} needs --data-root, the folder that holds {holding}.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; --data-root must be the folder that holds {holding}.")
    return root


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder by the lower-case stem of their names.

    Raises:
        UserError: if two of them have the same.
    """
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            other = images.setdefault(path.stem.lower(), path)
            if other is not path:
                raise UserError(f"{folder} holds both {other.name} and {path.name}; remove one of the two.")
    return images


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The images and volumes of a folder by lower-case stem, in the order of their names.

    Raises:
        UserError: if two of them have the same.
    """
    volumes = {without_suffix(path.name.lower()): path for path in folder.iterdir() if is_volume(path)}
    images = images_by_stem(folder)
    for stem in volumes.keys() & images.keys():
        raise UserError(f"{folder} holds both {volumes[stem].name} and {images[stem].name}; remove one of the two.")
    return dict(sorted((images | volumes).items()))


def read_image_or_slice(path: Path, number: int | None) -> np.ndarray:
    """An image file, or a slice of a volume, as (H, W, 3), float32 between zero and one."""
    return read_image(path) if number is None else in_colour(read_image_slice(path, number))


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3), float32 between zero and one.

    Grey values of more than eight bits, as CT and MR are exported, are stretched from the image's lowest to its
    highest.
    """
    image = open_image(path)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{path} holds values that are no numbers; replace them, or remove the image.")
        low, high = float(values.min()), float(values.max())
        return in_colour(((values - low) / max(high - low, 1e-8)).clip(0, 1))
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def read_mask(path: Path) -> np.ndarray:
    """A mask file's values, (H, W); of a grey picture saved in three channels, or four, those of the first.

    Raises:
        UserError: if it is in colours.
    """
    image = open_image(path)
    values = np.asarray(image)
    if values.ndim == 2:
        return values
    colours = values[..., : len(image.getbands()) - image.mode.endswith("A")]
    if (colours != colours[..., :1]).any():
        raise UserError(f"{path} is a mask in colours; save it with one channel, a whole number for each label.")
    return values[..., 0]


def in_colour(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) as (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def check_same_size(image: np.ndarray, mask: np.ndarray, mask_path: Path) -> None:
    """Raises a UserError, naming the mask's file, if it is not of its image's height and width."""
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}; "
            "put in the pair that belongs together."
        )


def require_known_values(mask: np.ndarray, known: Collection[int], mask_path: Path) -> None:
    """Raises a UserError, naming the file and the values, if a mask holds values that belong to no label."""
    unknown = sorted(set(np.unique(mask).tolist()) - set(known))
    if unknown:
        some = ", ".join(map(str, unknown[:8])) + (" and others" if len(unknown) > 8 else "")
        raise UserError(f"{mask_path} holds {some}, which belong to no label; known are {sorted(known)}.")


def require_label_names(labels: Sequence[str], path: Path) -> None:
    """Raises a UserError, naming the file, if labels cannot be folders' names, which predict.py gives their masks."""
    seen: dict[str, str] = {}
    for label in labels:
        if reason := why_not_a_folder(label):
            raise UserError(f"{path} has the label {label!r}; its name is also a folder's, and this one {reason}.")
        other = seen.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label or labels.count(label) > 1:
            raise UserError(f"{path} has the labels {other!r} and {label!r}, which are one folder on some systems.")


def open_image(path: Path) -> Image.Image:
    """An image file's pixels, or a UserError that names it."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image; replace or remove the file.") from error
    return image
