"""The user's own images and masks, in any layout of `sam_medical.data.layouts`.

``images/`` contains the images. ``masks/`` contains the masks in one of two ways. Each mask has the name of its
image, or a name that starts with it.

- One label map per image. ``labels.json`` beside the folders gives the values or colours of the labels, such as
  {"liver": 1, "tumor": 2}. Zero is background.
- One folder of binary masks per label, such as ``masks/liver`` and ``masks/tumor``. An image without a mask in a
  folder does not contain that label. A split may lack a folder.

The following layouts are read as they are: nnU-Net raw data, the Medical Decathlon, COCO files, labelme files, masks
beside their images, and one folder per patient. Volumes and stacks are read slice by slice.

Folders ``train``, ``validation`` and ``test`` define the splits. They may also be inside ``images`` and ``masks``.
Without them, of every ten images or volumes, sorted by name, one is for validation and two are for the test. If the
images are in ten or more folders, the same rule applies to folders instead. Neighbouring slices or frames that are
separate files could then fall into different splits, so give such data one folder per split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sam_medical.common.errors import UserError
from sam_medical.data.base import TURNS, Sample, SegmentationDataset, require_folder
from sam_medical.data.decoding import EXTENSIONS, NIFTI, Scan, suffix_of
from sam_medical.data.layouts import coco_split, has_images, read_part
from sam_medical.data.parts import Pair, Part
from sam_medical.data.reading import Reading, name_of, numbers_of, read_slice, scan_of
from sam_medical.data.sources import folders_in
from sam_medical.data.splits import SPLIT_NAMES, pairs_below

HOLDING = "images, masks and labels.json"
LEAST_FOLDERS = 10


class OwnData(SegmentationDataset):
    splits = ("train", "validation", "test")

    def __init__(self, root: Path | None, split: str, reading: Reading | None = None) -> None:
        super().__init__(root, split, reading)
        root = require_folder(root, "own", HOLDING)
        folders = _split_folders(root)
        if folders and split not in folders:
            raise UserError(f"{root} has folders for its splits, but none for {split}; add {root / split / 'images'}.")
        coco_part = None if folders else coco_split(root, split)
        part = coco_part or read_part(folders.get(split, root), root, list(folders.values()) or [root])
        self.labels: Sequence[str] = tuple(part.labels)
        self.notes = part.notes
        if part.modality:
            self.reading = replace(self.reading, modality=part.modality)
        below = None if folders or coco_part else pairs_below(part.pairs, split, part.folder)
        part.pairs = part.pairs if below is None else below
        pairs = part.pairs if folders or coco_part or below else self._in_turn(part)
        if not pairs:
            raise UserError(
                f"{part.folder} holds {len(part.pairs)} images, too few for the split {split}: give ten, or "
                f"folders train, validation and test. It may hold {', '.join(EXTENSIONS)}."
            )
        self.by_folder = _has_many_folders(part.pairs)
        self.items: list[tuple[Pair, int | None]] = []
        for pair in pairs:
            if suffix_of(pair.image.path.name) in NIFTI:
                pair.annotation.check(pair.image, self.reading)
            self.items += [(pair, number) for number in numbers_of(pair.image, self.reading.plane)]

    def _in_turn(self, part: Part) -> list[Pair]:
        """Returns the pairs of this split by position: images, or folders if there are at least ten of them."""
        if _has_many_folders(part.pairs):
            folders = sorted({pair.image.folder for pair in part.pairs})
            in_split = {folder for place, folder in enumerate(folders) if place % 10 in TURNS[self.split]}
            return [pair for pair in part.pairs if pair.image.folder in in_split]
        if any(pair.image.folder for pair in part.pairs):
            self.notes = [*self.notes, "splits are by image, and not by folder, of which there are fewer than ten"]
        return [pair for place, pair in enumerate(part.pairs) if place % 10 in TURNS[self.split]]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Sample:
        pair, number = self.items[index]
        image = read_slice(pair.image, number, self.reading)
        masks = pair.annotation.read(pair.image, number, image.shape[:2], self.reading)
        group = pair.image.flat_name if number is not None else pair.image.folder if self.by_folder else ""
        return Sample(name_of(pair.image, number), image, masks, group)

    def scan(self, index: int) -> Scan:
        return scan_of(self.items[index][0].image)


def _has_many_folders(pairs: Sequence[Pair]) -> bool:
    return all(pair.image.folder for pair in pairs) and len({pair.image.folder for pair in pairs}) >= LEAST_FOLDERS


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of the splits, by split; nothing if none contains images."""
    folders = {path.name.lower(): path for path in folders_in(root)}
    found = {
        split: next(folders[name] for name in names if name in folders)
        for split, names in SPLIT_NAMES.items()
        if any(name in folders for name in names)
    }
    return found if any(has_images(folder) for folder in found.values()) else {}
