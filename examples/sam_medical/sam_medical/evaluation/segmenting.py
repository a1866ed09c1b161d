"""Segmenting a folder of files with a trained adapter, and saying what could not be read."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_medical.common.errors import UserError
from sam_medical.common.files import write_json
from sam_medical.data.folder import sources_to_segment
from sam_medical.data.sources import Source
from sam_medical.evaluation.segmenter import Segmenter, load
from sam_medical.options.commands import PredictOptions

NOT_ALL_READ = 3
# Files that often lie beside images, which nobody takes for one.
TEXTS = (".csv", ".tsv", ".txt", ".json", ".md", ".xml", ".xlsx", ".pdf", ".yaml", ".yml", ".html", ".rtf", "")


def segment_files(options: PredictOptions) -> None:
    """Segments each file, writes its masks and the report, and says what could not be read.

    Raises:
        SystemExit: with `NOT_ALL_READ`, if something could not be read.
    """
    sources, unknown = sources_to_segment(Path(options.images), skip=[Path(options.output)])
    segmenter = load(
        options.adapter,
        options.backbone,
        threshold=options.threshold,
        largest_component=options.largest_component,
        batch_size=options.batch_size,
    )
    found: list[dict[str, Any]] = []
    unread = [f"{path} is not an image" for path in unknown if path.suffix.lower() not in TEXTS]
    for source in tqdm(sources, unit="file", disable=None):
        try:
            found.append(_segment(segmenter, source, options))
        except UserError as error:
            unread.append(str(error))
    if options.report:
        write_json(Path(options.report), {"files": found, "not_read": unread})
    for entry in found:
        for note in _notes(entry):
            print(f"note: {entry['file']}{note.rstrip('.')}.", file=sys.stderr)
    labels = ", ".join(segmenter.labels)
    print(f"Wrote the masks of {len(found)} files for {labels} to {options.output}.")
    if unread:
        print(f"{len(unread)} files were not read:", *unread, sep="\n  ", file=sys.stderr)
        sys.exit(NOT_ALL_READ)


def _segment(segmenter: Segmenter, source: Source, options: PredictOptions) -> dict[str, Any]:
    """Writes the masks of one source; returns its entry in the report."""
    started = time.monotonic()
    segmentation = segmenter.segment_source(source)
    problems = segmentation.save(options.output, options.probabilities)
    return {
        "file": str(source.path),
        "name": source.name,
        "seconds": round(time.monotonic() - started, 3),
        "labels": segmentation.measures,
        **problems,
        **({"doubt": segmentation.doubt} if segmentation.doubt else {}),
    }


def _notes(entry: dict[str, Any]) -> list[str]:
    notes = [f" has masks, but no DICOM SEG: {entry['no_dicom_seg']}"] if "no_dicom_seg" in entry else []
    return notes + ([f": {entry['doubt']}"] if "doubt" in entry else [])
