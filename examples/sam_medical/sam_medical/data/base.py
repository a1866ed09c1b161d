"""What every dataset gives: images with one mask a label, the same labels for every image."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from sam_medical.common.errors import UserError, first_line
from sam_medical.common.names import why_not_a_folder
from sam_medical.data.decoding import DICOM, VOLUMES, Scan, suffix_of
from sam_medical.data.reading import Reading, read_slice, scan_of
from sam_medical.data.sources import is_junk, plain, source_of_file

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
    # How many folds there are. A dataset that has some gets one of them, from 1, as the fourth argument of `__init__`.
    folds: ClassVar[int] = 0
    labels: Sequence[str]
    # What a person should know of what was found.
    notes: Sequence[str] = ()

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        self.root = root
        self.split = split
        self.reading = reading or Reading()
        self._kept: list[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The image with the masks of all the dataset's labels."""

    def scan(self, index: int) -> Scan | None:
        """The file of an image, decoded, where how to read it depends on what is in it."""
        return None

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
        suffix = suffix_of(path.name)
        if suffix and suffix not in (*VOLUMES, *DICOM) and not is_junk(path):
            other = images.setdefault(plain(path.stem).lower(), path)
            if other is not path:
                raise UserError(f"{folder} holds both {other.name} and {path.name}; remove one of the two.")
    return images


def read_image(path: Path, reading: Reading | None = None) -> np.ndarray:
    """An image file as (H, W, 3), float32 between zero and one."""
    _require_one_picture(path)
    return read_slice(source_of_file(path), None, reading or Reading())


def read_mask(path: Path) -> np.ndarray:
    """A mask file's values, (H, W); of a grey picture saved in three channels, or four, those of the first.

    Raises:
        UserError: if it is in colours.
    """
    scan = _require_one_picture(path)
    if scan.indices is not None:
        return scan.indices[0]
    values = scan.values[0]
    if values.ndim == 2:
        return values
    if (values != values[..., :1]).any():
        raise UserError(f"{path} is a mask in colours; save it with one channel, a whole number for each label.")
    return values[..., 0]


def read_colours(path: Path) -> np.ndarray:
    """A picture's colours, (H, W, 3)."""
    values = _require_one_picture(path).values[0]
    return values if values.ndim == 3 else in_colour(values)


def _require_one_picture(path: Path) -> Scan:
    scan = scan_of(source_of_file(path))
    if scan.is_stack:
        raise UserError(f"{path} is not one picture but {len(scan.values)}; save each as a file of its own.")
    return scan


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
