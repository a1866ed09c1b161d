"""What every dataset gives: images with one mask a label, the same labels for every image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ssam.errors import UserError

EXTENSIONS = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


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
        sample = self.read(index)
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


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3), float32 between zero and one.

    Grey values of more than eight bits, as CT and MR are exported, are stretched from the image's lowest to its
    highest.
    """
    image = open_image(path)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        return np.repeat(stretched(values, float(values.min()), float(values.max()))[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def read_mask(path: Path) -> np.ndarray:
    """A single-channel mask file's values, (H, W); of a file with colours, the first channel."""
    values = np.asarray(open_image(path))
    return values if values.ndim == 2 else values[..., 0]


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from ``low`` to ``high`` as float32 between zero and one."""
    return ((values.astype(np.float32) - low) / max(high - low, 1e-8)).clip(0, 1)


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


def open_image(path: Path) -> Image.Image:
    """An image file's pixels, or a UserError that names it."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image; replace or remove the file.") from error
    return image
