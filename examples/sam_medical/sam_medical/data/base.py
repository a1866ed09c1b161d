"""The base class of all datasets, and helpers to read image and mask files."""

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

# Positions within each ten consecutive patients or images, for data without a split of its own.
TURNS = {"train": (0, 1, 2, 4, 5, 6, 8), "validation": (3,), "test": (7, 9)}


@dataclass(frozen=True)
class Sample:
    """An image with its masks, at the image's own size.

    Attributes:
        name: Unique within the dataset.
        image: (H, W, 3), float32 between zero and one.
        masks: (K, H, W), bool, in the order of the dataset's labels; an absent label has an empty mask.
        group: The patient, volume or video of the image. Such images resemble each other. Empty if none.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    group: str = ""


class SegmentationDataset(ABC):
    """One split of a dataset; ``dataset[i]`` is a `Sample`.

    A subclass defines the class attributes ``splits`` and ``labels``, finds its files in ``__init__`` (and raises
    `UserError` there if files are missing), and reads one image in ``read``.
    """

    splits: ClassVar[tuple[str, ...]]
    # Number of folds. If above 0, the fourth argument of `__init__` is the fold, starting at 1.
    folds: ClassVar[int] = 0
    labels: Sequence[str]
    # Messages to the user about the files found.
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
        """Reads one image, with masks for all labels of the dataset."""

    def scan(self, index: int) -> Scan | None:
        """Returns the decoded file of an image, or None if its intensities need no window and no offset."""
        return None

    def keep_labels(self, labels: Sequence[str]) -> None:
        """Restricts all samples to the masks of these labels, in this order."""
        self._kept = [list(self.labels).index(label) for label in labels]
        self.labels = tuple(labels)

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = self.read(index)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.root}: image {index} of the split {self.split} cannot be read ({first_line(error)})."
            ) from error
        check_sample(sample, len(self.labels) if self._kept is None else None, f"{type(self).__name__}, {self.split}")
        if self._kept is None:
            return sample
        return replace(sample, masks=sample.masks[self._kept])


def check_sample(sample: Sample, labels: int | None, where: str) -> None:
    """Raises a `UserError` unless a sample has the name, shapes, types and values that `Sample` promises.

    Args:
        sample: What a dataset's ``read`` returned.
        labels: The number of masks it must have; None for any.
        where: The dataset and the split, for the message.
    """
    if not isinstance(sample, Sample):
        raise UserError(f"{where}: read must return a Sample, and it returns {type(sample).__name__}.")
    name, image, masks = sample.name, sample.image, sample.masks
    is_file_name = bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")
    problems = {
        f"name is {name!r}, but it must be a file name": not is_file_name,
        f"image has shape {image.shape}, but it must be (H, W, 3)": image.ndim != 3 or image.shape[-1] != 3,
        f"image is {image.dtype}, but it must be float32": image.dtype != np.float32,
        f"masks have shape {masks.shape}, but it must be (K, H, W), as the image": masks.shape[1:] != image.shape[:2],
        f"there are {len(masks)} masks for {labels} labels": labels is not None and len(masks) != labels,
        f"masks are {masks.dtype}, but they must be bool": masks.dtype != bool,
    }
    problem = next((text for text, is_so in problems.items() if is_so), None)
    if problem is None and not (image.min(initial=0) >= 0 and image.max(initial=0) <= 1):
        problem = f"image has values from {image.min()} to {image.max()}, but they must be between 0 and 1"
    if problem is not None:
        raise UserError(f"{where}: image {name!r} cannot be used: {problem}.")


def require_folder(root: Path | None, dataset: str, holding: str) -> Path:
    """Returns the data folder. Raises a `UserError` that names the expected content if it does not exist."""
    if root is None:
        raise UserError(f"{dataset} needs --data-root, the folder that holds {holding}.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; --data-root must be the folder that holds {holding}.")
    return root


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Returns the image files of a folder by the lower-case stem of their names.

    Raises:
        UserError: if two files have the same stem.
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
    """Reads an image file as (H, W, 3), float32 between zero and one."""
    _require_one_picture(path)
    return read_slice(source_of_file(path), None, reading or Reading())


def read_mask(path: Path) -> np.ndarray:
    """Reads the values of a mask file, (H, W). A grey mask may be saved with three or four channels.

    Raises:
        UserError: if the mask is in colour.
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
    """Reads the colours of an image file, (H, W, 3)."""
    values = _require_one_picture(path).values[0]
    return values if values.ndim == 3 else in_colour(values)


def _require_one_picture(path: Path) -> Scan:
    scan = scan_of(source_of_file(path))
    if scan.is_stack:
        raise UserError(f"{path} is not one picture but {len(scan.values)}; save each as a file of its own.")
    return scan


def in_colour(grey: np.ndarray) -> np.ndarray:
    """Repeats grey values (H, W) as three equal channels, (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def check_same_size(image: np.ndarray, mask: np.ndarray, mask_path: Path) -> None:
    """Raises a `UserError` that names the mask file if image and mask differ in height or width."""
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}; "
            "use the image and the mask that belong together."
        )


def require_known_values(mask: np.ndarray, known: Collection[int], mask_path: Path) -> None:
    """Raises a `UserError` that names the file and the values if a mask contains values of no label."""
    unknown = sorted(set(np.unique(mask).tolist()) - set(known))
    if unknown:
        some = ", ".join(map(str, unknown[:8])) + (" and others" if len(unknown) > 8 else "")
        raise UserError(f"{mask_path} holds {some}, which belong to no label; known are {sorted(known)}.")


def require_label_names(labels: Sequence[str], path: Path) -> None:
    """Raises a `UserError` if a label cannot be the name of a folder: predict.py writes one folder per label."""
    seen: dict[str, str] = {}
    for label in labels:
        if reason := why_not_a_folder(label):
            raise UserError(f"{path} has the label {label!r}; its name is also a folder name, and this one {reason}.")
        other = seen.setdefault(unicodedata.normalize("NFC", label).casefold(), label)
        if other != label or labels.count(label) > 1:
            raise UserError(
                f"{path} has the labels {other!r} and {label!r}, which are the same folder on some systems."
            )
