"""Opens one split of a dataset, or the three splits of a run, and resolves ``auto`` in how images are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError, first_line
from sam_medical.data import DATASETS, dataset_and_fold
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.decoding import Scan
from sam_medical.data.intensity import AUTO, AUTO_CT, settle
from sam_medical.data.offset import AUTO as AUTO_OFFSET
from sam_medical.data.offset import BY_IMAGE, NONE, offset_seen, settle_offset, without_offset
from sam_medical.data.reading import Reading

# Number of evenly spaced training images that decide.
SETTLED_BY = 20
# Number of images if the offset of 16-bit images is still unknown after the first ones.
LOOKED_THROUGH = 300
TRAINING_SPLITS = ("train", "validation", "test")


def open_dataset(
    name: str,
    root: str | None,
    split: str,
    labels: list[str] | None = None,
    reading: Reading | None = None,
    fold: int | None = None,
) -> SegmentationDataset:
    """Opens one split of a dataset, with all of its labels or some of them.

    Args:
        name: The dataset's name in `DATASETS`.
        root: The folder of its files.
        split: One of its splits.
        labels: The labels to keep, in this order; None for all.
        reading: How its files are read.
        fold: The fold, starting at 1, if the dataset has folds.

    Raises:
        UserError: if the dataset, its folder, the fold, the split or a label does not exist, or the split is empty.
    """
    name, fold = dataset_and_fold(name, fold)
    if name not in DATASETS:
        raise UserError(DATASETS.unknown(name))
    dataset_type = DATASETS[name]
    check_fold(name, fold)
    if split not in dataset_type.splits:
        raise UserError(f"{name} has no split {split!r}; choose from {', '.join(dataset_type.splits)}.")
    try:
        folder = Path(root) if root else None
        dataset = dataset_type(folder, split, reading, *([] if fold is None else [fold]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{root} cannot be read as {name} ({first_line(error)}).") from error
    if not len(dataset):
        raise UserError(f"{root} holds no images of the split {split} of {name}; add some.")
    unknown = [label for label in labels or [] if label not in dataset.labels]
    if unknown:
        raise UserError(f"{name} has no label {unknown[0]!r}; choose from {', '.join(dataset.labels)}.")
    if labels:
        dataset.keep_labels(labels)
    return dataset


def check_fold(name: str, fold: int | None) -> None:
    """Raises a `UserError` if the fold does not exist, or if the dataset has folds and none is given."""
    folds = DATASETS[name].folds
    if fold is not None and not folds:
        raise UserError(f"fold is {fold}, but {name} has no folds; leave it out.")
    if folds and (fold is None or not 1 <= fold <= folds):
        raise UserError(f"fold is {fold}, but {name} has {folds} folds; give --fold, from 1 to {folds}.")


def open_splits(
    name: str,
    root: str | None,
    labels: list[str] | None = None,
    reading: Reading | None = None,
    fold: int | None = None,
) -> dict[str, SegmentationDataset]:
    """Opens the train, validation and test splits, all with the labels of train in the same order.

    Raises:
        UserError: as `open_dataset`.
    """
    first, *others = TRAINING_SPLITS
    train = open_dataset(name, root, first, labels, reading, fold)
    rest = {split: open_dataset(name, root, split, list(train.labels), reading, fold) for split in others}
    return {first: train, **rest}


def settle_reading(train: SegmentationDataset) -> Reading:
    """Returns the dataset's reading, with ``auto`` offset and intensity resolved from the training images.

    Raises:
        UserError: if training images contradict each other.
    """
    reading = train.reading
    if reading.offset == AUTO_OFFSET:
        reading = replace(reading, offset=settle_offset(_scans_for_offset(train)))
    if reading.intensity != AUTO:
        return reading
    if reading.offset not in (NONE, BY_IMAGE):
        return replace(reading, intensity=AUTO_CT)
    as_read = ((without_offset(scan, reading.offset), modality) for scan, modality in _scans(train, SETTLED_BY))
    return replace(reading, intensity=settle(AUTO, as_read))


def _scans(train: SegmentationDataset, count: int) -> Iterator[tuple[Scan, str]]:
    """Yields up to ``count`` evenly spaced training scans with their modality."""
    for place in np.linspace(0, len(train) - 1, min(len(train), count)).round().astype(int):
        scan = train.scan(int(place))
        if scan is not None:
            yield scan, train.reading.modality


def _scans_for_offset(train: SegmentationDataset) -> Iterator[tuple[Scan, str]]:
    """Yields some scans, and many more if one of them is a 16-bit image that does not show its offset."""
    is_open = False
    for scan, modality in _scans(train, SETTLED_BY):
        is_open |= scan.affine is None and scan.values.dtype == np.uint16 and not offset_seen(scan, modality)
        yield scan, modality
    if is_open:
        yield from _scans(train, LOOKED_THROUGH)
