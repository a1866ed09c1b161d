"""ChestX-Det: findings in chest X-rays, 13 labels, in the public layout.

``ChestX_Det_train.json`` and ``ChestX_Det_test.json`` list the images with a polygon for each finding; the images are
in ``train_data`` and ``test_data``, or in any other folder beside the lists. Findings overlap, so each label has its
own mask. The split follows the paper, by image number. The paper's test set is every fifth test image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sam_medical.common.errors import UserError
from sam_medical.data.base import Sample, SegmentationDataset, read_image, require_folder
from sam_medical.data.reading import Reading

LABELS = (
    "Effusion",
    "Nodule",
    "Cardiomegaly",
    "Fibrosis",
    "Consolidation",
    "Emphysema",
    "Mass",
    "Fracture",
    "Calcification",
    "Pleural Thickening",
    "Pneumothorax",
    "Atelectasis",
    "Diffuse Nodule",
)
LAST_TRAINED = 69565
TEST_EVERY = 5
HOLDING = "ChestX_Det_train.json and ChestX_Det_test.json"


class ChestXDet(SegmentationDataset):
    splits = ("train", "validation", "test", "test-all")
    labels = LABELS

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        root = require_folder(root, "chestx-det", HOLDING)
        part = "test" if split.startswith("test") else "train"
        path = root / f"ChestX_Det_{part}.json"
        self.records = sorted(_read_records(path), key=lambda record: _number(record["file_name"]))
        if part == "train":
            is_trained = split == "train"
            self.records = [
                record for record in self.records if (_number(record["file_name"]) <= LAST_TRAINED) == is_trained
            ]
        elif split == "test":
            self.records = self.records[::TEST_EVERY]
        found = _find_images(root, f"{part}_data", [record["file_name"] for record in self.records])
        missing = [record["file_name"] for record in self.records if record["file_name"] not in found]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.records)} images that {path} lists for the split {split} are in no "
                f"folder of {root}, first {missing[0]}; put the images into {root / f'{part}_data'}."
            )
        self.images = [found[record["file_name"]] for record in self.records]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        image = read_image(self.images[index], self.reading)
        return Sample(self.images[index].stem, image, masks_of(self.records[index], *image.shape[:2]))


def _find_images(root: Path, usual: str, names: list[str]) -> dict[str, Path]:
    """Finds images by name: first in the usual folder, then anywhere below the root if the name is unique there."""
    found = {name: root / usual / name for name in names if (root / usual / name).is_file()}
    wanted = set(names) - found.keys()
    if wanted:
        for path in sorted(root.rglob("*")):
            if path.name in wanted:
                other = found.setdefault(path.name, path)
                if other != path:
                    raise UserError(f"{other} and {path} have one name; put the image into {root / usual}.")
    return found


def masks_of(record: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Rasterises the polygons of a record as one bool mask per label, (K, H, W)."""
    masks = [Image.new("1", (width, height)) for _ in LABELS]
    for symptom, polygon in zip(record["syms"], record["polygons"], strict=True):
        ImageDraw.Draw(masks[LABELS.index(symptom)]).polygon([tuple(point) for point in polygon], fill=1, outline=1)
    return np.stack([np.asarray(mask, dtype=bool) for mask in masks])


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a file and checks that each one is complete.

    Raises:
        UserError: if the file cannot be read, or a record has an unknown label or not one polygon per finding.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; --data-root must be the folder that holds {HOLDING}."
        ) from error
    for record in records:
        absent = {"file_name", "syms", "polygons"} - record.keys()
        if absent:
            raise UserError(f"{path} has a record without {min(absent)}; download it again.")
        name = record["file_name"]
        unknown = sorted(set(record["syms"]) - set(LABELS))
        if unknown:
            raise UserError(f"{path} gives {name} the label {unknown[0]!r}; it may be {', '.join(LABELS)}.")
        if len(record["syms"]) != len(record["polygons"]):
            raise UserError(f"{path} does not give {name} one polygon for each of its labels; download it again.")
        if any(len(polygon) < 2 for polygon in record["polygons"]):
            raise UserError(f"{path} gives {name} a polygon of fewer than two points; download it again.")
    return records


def _number(file_name: str) -> int:
    digits = Path(file_name).stem
    if not digits.isdigit():
        raise UserError(f"{file_name} is not named by a number, as the images of ChestX-Det are; download it again.")
    return int(digits)
