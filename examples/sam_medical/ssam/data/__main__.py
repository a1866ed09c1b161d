"""Shows what is in a data folder, before anyone trains on it.

    PYTHONPATH=examples/sam_medical python -m ssam.data --dataset glas --data-root FOLDER [--sheet contact_sheet.png]

For each split: how many images, of which sizes, in how many each label is, and how much of the image it takes; and a
picture of some images with their masks drawn.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssam.data import DATASETS, SegmentationDataset, open_dataset
from ssam.data.loading import spread
from ssam.errors import UserError, one_line_errors
from ssam.options import option, parse_options
from ssam.report import draw_contact_sheet

SHOWN_A_SPLIT = 6


@dataclass
class SummaryOptions:
    """Show what is in a data folder: images a split, label frequencies, a contact sheet."""

    dataset: str = option("brain-mri", f"One of {', '.join(DATASETS)}.")
    data_root: str | None = option(None, "Folder of the dataset's files.")
    sheet: str | None = option(None, "File for a picture of some images of each split with their masks.")


def summarize(dataset: SegmentationDataset, split: str) -> str:
    """A Markdown table of the split's labels."""
    sizes: Counter[tuple[int, int]] = Counter()
    present = np.zeros(len(dataset.labels), dtype=int)
    shares = np.zeros(len(dataset.labels))
    blank = 0
    for index in tqdm(range(len(dataset)), desc=f"Reading {split}", leave=False):
        masks = dataset[index].masks
        height, width = masks.shape[1:]
        sizes[width, height] += 1
        present += masks.any((1, 2))
        shares += masks.mean((1, 2))
        blank += not masks.any()
    (width, height), count = sizes.most_common(1)[0]
    others = f" ({count} of them; {len(sizes)} sizes in all)" if len(sizes) > 1 else ""
    lines = [
        f"{split}: {len(dataset)} images of {width}x{height}{others}, {blank} without any label",
        "",
        "| label | images that have it | share of their pixels |",
        "|---|---|---|",
    ]
    for label, number, share in zip(dataset.labels, present, shares, strict=True):
        of_pixels = f"{100 * share / number:.2f} %" if number else ""
        lines.append(f"| {label} | {number} ({100 * number / len(dataset):.0f} %) | {of_pixels} |")
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    options = parse_options(SummaryOptions)
    if options.dataset not in DATASETS:
        raise UserError(f"unknown dataset {options.dataset!r}; choose from {', '.join(sorted(DATASETS))}.")
    shown = {}
    bad = 0
    for split in DATASETS[options.dataset].splits:
        try:
            dataset = open_dataset(options.dataset, options.data_root, split)
        except UserError as error:
            print(f"{split}: {error}\n")
            continue
        try:
            print(summarize(dataset, split) + "\n")
        except UserError as error:
            print(f"{split}: {error}\n")
            bad += 1
            continue
        shown[split] = (spread(dataset, SHOWN_A_SPLIT), dataset.labels)
    if not shown:
        raise UserError(f"no split of {options.dataset} can be read; see above.")
    if options.sheet:
        draw_contact_sheet(shown, Path(options.sheet))
        print(f"{options.sheet}")
    if bad:
        raise UserError(f"{bad} of the splits hold files that cannot be used; see above.")


if __name__ == "__main__":
    main()
