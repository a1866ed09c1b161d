"""Inspection of a data folder: counts, value ranges, labels and warnings per split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sam_medical.common.errors import UserError
from sam_medical.common.files import replacing_file, write_json
from sam_medical.data import DATASETS, dataset_and_fold
from sam_medical.data.base import SegmentationDataset
from sam_medical.data.loading import thinned
from sam_medical.data.opening import open_dataset, settle_reading
from sam_medical.data.survey import Survey, describe_files, shared_images, warnings_of
from sam_medical.evaluation.report import draw_contact_sheet, shrunk
from sam_medical.options.commands import InspectOptions

SHOWN_A_SPLIT = 6
KINDS_SHOWN = 4


def inspect(options: InspectOptions) -> None:
    """Reads every image of every split, prints statistics, and writes the requested files.

    Raises:
        UserError: if a split cannot be read.
    """
    datasets, errors = open_all(options)
    surveys: dict[str, Survey] = {}
    content: dict[str, Any] = {}
    for split, dataset in datasets.items():
        survey = Survey(dataset.labels, options.framing, with_contrast=True)
        try:
            read_all(dataset, split, survey, Path(options.dump) / split if options.dump else None)
            files = describe_files(dataset)
        except UserError as error:
            errors[split] = str(error)
            continue
        surveys[split] = survey
        content[split] = {**survey.as_json(), "notes": list(dataset.notes), "files": files}
        print(format_split(split, content[split], dataset))
    for split, problem in errors.items():
        print(f"{split}: {problem}\n")
    if not surveys:
        raise UserError(in_short(errors))
    note_lines = warnings_of(surveys) if "train" in surveys else []
    for line in note_lines:
        print(f"note: {line}")
    if options.json:
        shared = [list(pair) for pair in shared_images(surveys)]
        write_json(
            Path(options.json), {"splits": content, "in_two_splits": shared, "notes": note_lines, "errors": errors}
        )
    if options.sheet:
        chosen = {split: thinned(datasets[split], SHOWN_A_SPLIT) for split in surveys}
        shown = {
            split: ([shrunk(samples[place]) for place in range(len(samples))], datasets[split].labels)
            for split, samples in chosen.items()
        }
        draw_contact_sheet(shown, Path(options.sheet))
        print(options.sheet)
    if errors:
        raise UserError(in_short(errors))


def in_short(errors: Mapping[str, str]) -> str:
    """Returns the first error, and the names of other splits with errors."""
    (split, problem), *_ = errors.items()
    others = [other for other, text in errors.items() if text != problem]
    return f"{split}: {problem}" + (f" The errors of {' and '.join(others)} are printed above." if others else "")


def open_all(options: InspectOptions) -> tuple[dict[str, SegmentationDataset], dict[str, str]]:
    """Opens all splits as training would.

    Returns:
        The splits that can be opened, and the error of each other split.
    """
    datasets: dict[str, SegmentationDataset] = {}
    errors: dict[str, str] = {}
    reading = options.reading
    name, fold = dataset_and_fold(options.dataset, options.fold)
    for split in DATASETS[name].splits:
        labels = list(datasets["train"].labels) if "train" in datasets else options.labels
        try:
            dataset = open_dataset(name, options.data_root, split, labels, reading, fold)
            if split == "train":
                reading = settle_reading(dataset)
                dataset.reading = replace(dataset.reading, intensity=reading.intensity, offset=reading.offset)
        except UserError as error:
            errors[split] = str(error)
            continue
        datasets[split] = dataset
    return datasets, errors


def read_all(dataset: SegmentationDataset, split: str, survey: Survey, dump: Path | None) -> None:
    for index in tqdm(range(len(dataset)), desc=f"reading {split}", leave=False, disable=None):
        sample = dataset[index]
        survey.add(sample)
        survey.look_at(dataset.scan(index), dataset.reading)
        if dump:
            with replacing_file(dump / f"{sample.name}.npz") as temporary:
                np.savez_compressed(
                    temporary, image=sample.image, masks=sample.masks, labels=np.array(list(dataset.labels))
                )


def format_split(split: str, content: Mapping[str, Any], dataset: SegmentationDataset) -> str:
    sizes = Counter(content["sizes"]).most_common()
    (size, count), others = sizes[0], len(sizes)
    more = f" ({count} of them; {others} sizes in all)" if others > 1 else ""
    lines = [f"{split}: {content['images']} images of {size}{more}, {content['blank_images']} without any label"]
    lines += [f"  {note}" for note in dataset.notes]
    lines += [f"  {line}" for line in format_files(content["files"])]
    lines += ["", "| label | images that have it | share of their pixels | left at the model's size | contrast |"]
    lines += ["|---|---|---|---|---|"]
    for label, values in content["labels"].items():
        share = f"{values['images']} ({100 * values['images'] / content['images']:.0f} %)"
        vanished = values["images_it_vanishes_from"]
        left = _percent(values["left_at_model_size"], ".0f") + (f", gone from {vanished}" if vanished else "")
        contrast = "" if values["contrast"] is None else f"{values['contrast']:+.3f}"
        lines.append(f"| {label} | {share} | {_percent(values['share_of_pixels'], '.2f')} | {left} | {contrast} |")
    return "\n".join(lines) + "\n"


def format_files(files: list[dict[str, Any]]) -> list[str]:
    """Formats one line per kind of file, with the number of such files."""
    kinds: Counter[tuple[str, str]] = Counter()
    lows: dict[tuple[str, str], list[float]] = {}
    for file in files:
        place = (
            f", {file['orientation']}, {' x '.join(map(str, file['spacing_mm']))} mm" if file["orientation"] else ""
        )
        kind = f"{file['kind']}{place}", str(file["read_as"])
        kinds[kind] += 1
        lows.setdefault(kind, []).extend(file["values"])
    lines = []
    for kind, count in kinds.most_common(KINDS_SHOWN):
        values = f"values from {min(lows[kind]):g} to {max(lows[kind]):g}"
        lines.append(f"{count} files: {kind[0]}, {values}; grey is {kind[1]}")
    return lines + ([f"and {len(kinds) - KINDS_SHOWN} other kinds of files"] if len(kinds) > KINDS_SHOWN else [])


def _percent(share: float | None, form: str) -> str:
    return "" if share is None else f"{100 * share:{form}} %"
