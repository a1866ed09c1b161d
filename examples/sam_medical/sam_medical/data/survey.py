"""Statistics of a split: sizes, labels, contrast, duplicates and doubtful files, in one pass over its images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from sam_medical.data.base import Sample, SegmentationDataset
from sam_medical.data.decoding import Scan
from sam_medical.data.doubts import doubt_about
from sam_medical.data.geometry import orientation_of
from sam_medical.data.intensity import describe
from sam_medical.data.loading import Framing, masks_for_training
from sam_medical.data.reading import Reading, as_read

# Width of the surroundings of a label, as a share of the image's shorter side; and its least width in pixels.
SURROUNDINGS = 0.03
LEAST_SURROUNDINGS = 2


@dataclass
class LabelCount:
    """Statistics of one label in one split. Lists have one entry per image with the label.

    Attributes:
        images: Number of images with the label.
        pixels: Number of pixels of the label in all images.
        shares: The label's share of the pixels.
        left: The share of the label's area that remains at the model's size.
        vanished: Names of the images from which the label vanishes at the model's size.
        contrasts: The label's mean grey minus that of its surroundings.
    """

    images: int = 0
    pixels: int = 0
    shares: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    contrasts: list[float] = field(default_factory=list)


class Survey:
    """Collects statistics of a split, sample by sample. Threads may add samples concurrently."""

    def __init__(self, labels: Sequence[str], framing: Framing, with_contrast: bool = False) -> None:
        self.labels = {label: LabelCount() for label in labels}
        self.framing = framing
        self.with_contrast = with_contrast
        self.sizes: Counter[str] = Counter()
        self.images = 0
        self.blank = 0
        self.names_by_content: dict[str, str] = {}
        self.doubts: dict[Path, str] = {}
        self._lock = Lock()

    def add(self, sample: Sample) -> None:
        content = hashlib.sha256(np.ascontiguousarray(sample.image).tobytes()).hexdigest()
        left = masks_for_training(sample, self.framing).sum((1, 2))
        scale = self.framing.pixels_for_one(*sample.image.shape[:2])
        contrasts = [self._contrast(sample, mask) for mask in sample.masks]
        with self._lock:
            self.images += 1
            self.sizes["{1}x{0}".format(*sample.image.shape)] += 1
            self.blank += not sample.masks.any()
            if sample.image.min() < sample.image.max():  # blank images would all count as duplicates
                self.names_by_content.setdefault(content, sample.name)
            for place, count in enumerate(self.labels.values()):
                pixels = int(sample.masks[place].sum())
                if not pixels:
                    continue
                count.images += 1
                count.pixels += pixels
                count.shares.append(pixels / sample.masks[place].size)
                count.left.append(float(left[place]) * scale / pixels)
                if not left[place]:
                    count.vanished.append(sample.name)
                if (contrast := contrasts[place]) is not None:
                    count.contrasts.append(contrast)

    def look_at(self, scan: Scan | None, reading: Reading) -> None:
        """Checks the file of a sample for doubtful values, once per file."""
        if scan is not None and scan.path not in self.doubts:
            self.doubts[scan.path] = doubt_about(as_read(scan, reading), reading)

    def _contrast(self, sample: Sample, mask: np.ndarray) -> float | None:
        if not self.with_contrast or not mask.any():
            return None
        reach = max(LEAST_SURROUNDINGS, round(SURROUNDINGS * min(mask.shape)))
        around = ndimage.distance_transform_cdt(~mask) <= reach
        around &= ~mask
        grey = sample.image.mean(2)
        return float(grey[mask].mean() - grey[around].mean()) if around.any() else None

    def absent(self) -> list[str]:
        return [label for label, count in self.labels.items() if not count.images]

    def as_json(self) -> dict[str, Any]:
        labels = {
            label: {
                "images": count.images,
                "pixels": count.pixels,
                "share_of_pixels": _mean(count.shares),
                "left_at_model_size": _mean(count.left),
                "images_it_vanishes_from": len(count.vanished),
                "contrast": _mean(count.contrasts),
            }
            for label, count in self.labels.items()
        }
        return {"images": self.images, "sizes": dict(self.sizes), "blank_images": self.blank, "labels": labels}


def describe_files(dataset: SegmentationDataset) -> list[dict[str, Any]]:
    """Describes each file: size, spacing, orientation, range of values, and their intensity mapping."""
    files: dict[Any, dict[str, Any]] = {}
    for index in range(len(dataset)):
        scan = dataset.scan(index)
        if scan is not None and scan.path not in files:
            files[scan.path] = _describe_file(as_read(scan, dataset.reading), dataset)
    return list(files.values())


def _describe_file(scan: Scan, dataset: SegmentationDataset) -> dict[str, Any]:
    low, high = scan.finite_range
    bounds, read_as = describe(dataset.reading.intensity, scan, dataset.reading.modality)
    return {
        "file": scan.path.name,
        "size": list(scan.values.shape[:3]),
        "spacing_mm": None if scan.affine is None else [round(float(side), 4) for side in voxel_sizes(scan.affine)],
        "orientation": None if scan.affine is None else orientation_of(scan.affine),
        "kind": str(scan.values.dtype) + (" in colour" if scan.in_colour else ""),
        "values": [low, high],
        "zero_and_one": bounds,
        "read_as": f"{read_as}, {scan.remark}" if scan.remark else read_as,
    }


def shared_images(surveys: Mapping[str, Survey]) -> list[tuple[str, str, str, str]]:
    """Returns images with equal content in two splits, as (split, name, other split, other name)."""
    found = []
    splits = list(surveys)
    for place, split in enumerate(splits):
        for other in splits[place + 1 :]:
            names, others = surveys[split].names_by_content, surveys[other].names_by_content
            found += [(split, names[content], other, others[content]) for content in names.keys() & others.keys()]
    return sorted(found)


def warnings_of(surveys: Mapping[str, Survey]) -> list[str]:
    """Returns warnings to read before training, such as absent or vanishing labels and images in two splits."""
    train = surveys["train"]
    lines = [
        f'no training image has the label "{label}": it cannot be learned, and is excluded from means'
        for label in train.absent()
    ]
    lines += [
        f'"{label}" covers all of each of the {count.images} training images that have it; look at the masks'
        for label, count in train.labels.items()
        if count.shares and min(count.shares) == 1
    ]
    for label, count in train.labels.items():
        if count.vanished:
            lines.append(
                f'"{label}" vanishes at the model\'s size from {len(count.vanished)} of the {count.images} training '
                f"images that have it, first {count.vanished[0]}; {train.framing.remedy}"
            )
    lines += [line for split, survey in surveys.items() for line in _doubts_of(split, survey)]
    pairs = shared_images(surveys)
    if pairs:
        split, name, other, name_there = pairs[0]
        lines.append(
            f"{len(pairs)} images are in two splits, first {name} of {split}, which is {name_there} of {other}; "
            "scores of trained images are meaningless"
        )
    return lines


def _doubts_of(split: str, survey: Survey) -> list[str]:
    counts = Counter(doubt for doubt in survey.doubts.values() if doubt)
    first = {doubt: path for path, doubt in sorted(survey.doubts.items(), reverse=True)}
    return [
        f"{count} of the {len(survey.doubts)} files of {split}, first {first[doubt]}, {doubt}"
        for doubt, count in counts.items()
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
