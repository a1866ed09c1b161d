"""Opening one split of a dataset, or the three of a run, and settling how its images are read."""

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

# Of the training images, evenly from the first to the last.
SETTLED_BY = 20
# As many more, where none of those says how sixteen bits hold the values of CT.
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
    """One split of a dataset, with all of its labels or some of them.

    Args:
        name: The dataset's name in `DATASETS`.
        root: The folder of its files.
        split: One of its splits.
        labels: The labels to keep, in this order; None for all.
        reading: How its files are read.
        fold: The fold, from 1, if the dataset has folds.

    Raises:
        UserError: if the dataset, its folder, the fold, the split or a label does not exist, or the split holds no
            images.
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
    """Raises a `UserError` if a dataset has no such fold, or has folds and none is given."""
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
    """What a run needs: train, validation and test, all with the labels of train in its order.

    Raises:
        UserError: as `open_dataset`.
    """
    first, *others = TRAINING_SPLITS
    train = open_dataset(name, root, first, labels, reading, fold)
    rest = {split: open_dataset(name, root, split, list(train.labels), reading, fold) for split in others}
    return {first: train, **rest}


def settle_reading(train: SegmentationDataset) -> Reading:
    """The dataset's reading with an offset and an intensity that its training images have made definite.

    Raises:
        UserError: if they contradict each other.
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
    """So many of the training images, evenly from the first to the last."""
    for place in np.linspace(0, len(train) - 1, min(len(train), count)).round().astype(int):
        scan = train.scan(int(place))
        if scan is not None:
            yield scan, train.reading.modality


def _scans_for_offset(train: SegmentationDataset) -> Iterator[tuple[Scan, str]]:
    """Some images, and many more if these are pictures of sixteen bits of which none shows its offset."""
    is_open = False
    for scan, modality in _scans(train, SETTLED_BY):
        is_open |= scan.affine is None and scan.values.dtype == np.uint16 and not offset_seen(scan, modality)
        yield scan, modality
    if is_open:
        yield from _scans(train, LOOKED_THROUGH)
