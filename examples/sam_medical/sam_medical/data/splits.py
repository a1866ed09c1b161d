"""What folders of splits are called, and images that lie in such folders below images/."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sam_medical.common.errors import UserError
from sam_medical.data.parts import Pair
from sam_medical.data.sources import Source

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def is_called(text: str, split: str) -> bool:
    """Whether a split's name is among the words of a file's or folder's, as in instances_val2017."""
    words = re.split(r"[^a-z]+", text.lower())
    return any(name in words for name in SPLIT_NAMES[split])


def split_named(folder: str) -> str:
    """The split whose name a folder has; empty if it has none's."""
    return next((split for split, names in SPLIT_NAMES.items() if folder.lower() in names), "")


def are_splits(folders: Sequence[str]) -> bool:
    """Whether folders' names are those of several splits, and nothing else."""
    return len({split_named(folder) for folder in folders} - {""}) > 1 and all(map(split_named, folders))


def pairs_below(pairs: Sequence[Pair], split: str, folder: Path) -> list[Pair] | None:
    """A split's images where all lie in folders of splits, as in images/train and images/val; None where none does so.

    Raises:
        UserError: if some lie beside those folders, or none in this split's.
    """
    folders = sorted({pair.image.folder for pair in pairs})
    if len({split_named(name) for name in folders} - {""}) < 2:
        return None
    stranger = next((pair.image.path for pair in pairs if not split_named(pair.image.folder)), None)
    if stranger is not None:
        raise UserError(
            f"{stranger} lies in none of the folders of splits, {', '.join(filter(split_named, folders))}; move it "
            "into one."
        )
    mine = [pair for pair in pairs if split_named(pair.image.folder) == split]
    if not mine:
        raise UserError(f"{folder} has folders for its splits, but none for {split}; add {folder / split}.")
    return [Pair(_below(pair), pair.annotation) for pair in mine]


def _below(pair: Pair) -> Source:
    return replace(pair.image, name=pair.image.name.split("/", 1)[1])
