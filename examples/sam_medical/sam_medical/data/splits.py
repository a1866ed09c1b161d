"""Names of split folders, and splits by folders inside images/."""

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
    """Whether a file or folder name contains the name of a split as a word, as in instances_val2017."""
    words = re.split(r"[^a-z]+", text.lower())
    return any(name in words for name in SPLIT_NAMES[split])


def split_named(folder: str) -> str:
    """Returns the split that a folder is named after; empty if there is none."""
    return next((split for split, names in SPLIT_NAMES.items() if folder.lower() in names), "")


def are_splits(folders: Sequence[str]) -> bool:
    """Whether all folders are named after splits, and after at least two of them."""
    return len({split_named(folder) for folder in folders} - {""}) > 1 and all(map(split_named, folders))


def pairs_below(pairs: Sequence[Pair], split: str, folder: Path) -> list[Pair] | None:
    """Returns the pairs of a split if images are in split folders, such as images/train and images/val.

    Returns:
        The pairs, without the split folder in their names; None if there are no such folders.

    Raises:
        UserError: if some images are outside of these folders, or the split has no folder.
    """
    folders = sorted({pair.image.folder for pair in pairs})
    if len({split_named(name) for name in folders} - {""}) < 2:
        return None
    outsider = next((pair.image.path for pair in pairs if not split_named(pair.image.folder)), None)
    if outsider is not None:
        raise UserError(
            f"{outsider} lies in none of the folders of splits, {', '.join(filter(split_named, folders))}; move it "
            "into one."
        )
    in_split = [pair for pair in pairs if split_named(pair.image.folder) == split]
    if not in_split:
        raise UserError(f"{folder} has folders for its splits, but none for {split}; add {folder / split}.")
    return [Pair(_below(pair), pair.annotation) for pair in in_split]


def _below(pair: Pair) -> Source:
    return replace(pair.image, name=pair.image.name.split("/", 1)[1])
