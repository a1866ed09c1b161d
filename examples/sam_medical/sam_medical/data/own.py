"""Images and masks of one's own, laid out in any of the ways of `sam_medical.data.layouts`.

``images/`` holds the images and ``masks/`` what belongs to each, under the same name, or one that begins with it, in
one of two ways:

- one mask an image, whose values or colours are the labels', as ``labels.json`` beside the folders says:
  {"liver": 1, "tumor": 2}; zero is background;
- or a folder of black and white masks for each label, ``masks/liver``, ``masks/tumor``; an image that has no mask in
  one of them does not have that label, nor has a split that lacks the folder.

nnU-Net's raw data, the Medical Decathlon's, COCO's and labelme's files, masks beside their images, and a folder a
patient are read as they are. Volumes and stacks are read slice by slice.

Where there are folders ``train``, ``validation`` and ``test``, also below ``images`` and ``masks``, they are the
splits. Otherwise of every ten images, or
volumes, in the order of their names, one is for validation and two are for the test; of every ten folders, if the
images lie in ten or more. Neighbouring slices or frames that are pictures of their own would
else be in several splits: give such images folders for each split.
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
        of_split = None if folders else coco_split(root, split)
        part = of_split or read_part(folders.get(split, root), root, list(folders.values()) or [root])
        self.labels: Sequence[str] = tuple(part.labels)
        self.notes = part.notes
        if part.modality:
            self.reading = replace(self.reading, modality=part.modality)
        below = None if folders or of_split else pairs_below(part.pairs, split, part.folder)
        part.pairs = part.pairs if below is None else below
        pairs = part.pairs if folders or of_split or below else self._in_turn(part)
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
        """Those of every ten images, or folders of images, that are this split's."""
        if _has_many_folders(part.pairs):
            folders = sorted({pair.image.folder for pair in part.pairs})
            mine = {folder for place, folder in enumerate(folders) if place % 10 in TURNS[self.split]}
            return [pair for pair in part.pairs if pair.image.folder in mine]
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
    """The folders of splits, if there are any with images."""
    folders = {path.name.lower(): path for path in folders_in(root)}
    found = {
        split: next(folders[name] for name in names if name in folders)
        for split, names in SPLIT_NAMES.items()
        if any(name in folders for name in names)
    }
    return found if any(has_images(folder) for folder in found.values()) else {}
