"""Segments files with a trained adapter: writes masks, measures them, and reports unreadable files."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from nibabel.affines import voxel_sizes
from scipy import ndimage
from torch import nn
from tqdm import tqdm

from sam_medical.adapters.adapter import load_adapter
from sam_medical.adapters.task import Task, read_task
from sam_medical.common.errors import UserError, first_line
from sam_medical.common.files import folder_in, write_json
from sam_medical.common.process import prepare_process
from sam_medical.data.decoding import Scan
from sam_medical.data.doubts import doubt_about
from sam_medical.data.folder import Slices, sources_to_segment
from sam_medical.data.loading import evaluation_loader
from sam_medical.data.reading import image_scan_of, scan_of
from sam_medical.data.sources import Source
from sam_medical.evaluation.mask_files import as_stored, write_dicom_seg, write_mask, write_probabilities
from sam_medical.evaluation.prediction import predict_logits
from sam_medical.methods import METHODS
from sam_medical.options.commands import PredictOptions

NOT_ALL_READ = 3
# Extensions of files that are obviously not images. They are skipped without a message.
TEXTS = (".csv", ".tsv", ".txt", ".json", ".md", ".xml", ".xlsx", ".pdf", ".yaml", ".yml", ".html", ".rtf", "")


@dataclass(frozen=True)
class Segmenter:
    """A model with its task and the options of the command."""

    model: nn.Module
    task: Task
    options: PredictOptions

    def segment(self, source: Source) -> dict[str, Any]:
        """Segments a source, writes its masks, and returns its entry in the report."""
        started = time.monotonic()
        slices = Slices(source, self.task.reading)
        batches = evaluation_loader(slices, self.task.framing, self.options.batch_size)
        logits = [logits.cpu() for _, logits in predict_logits(self.model, batches)]
        probabilities = torch.sigmoid(torch.stack(logits, dim=1)).numpy()  # (K, N, H, W)
        masks = probabilities > self.options.threshold
        if self.options.largest_component:
            masks = np.stack([_largest(mask) for mask in masks])
        scan = scan_of(source)
        problems = self._write(source, scan, masks, probabilities)
        labels = {
            label: _measure(scan, mask, probability)
            for label, mask, probability in zip(self.task.labels, masks, probabilities, strict=True)
        }
        seconds = round(time.monotonic() - started, 3)
        doubt = doubt_about(image_scan_of(source, self.task.reading), self.task.reading)
        doubt_entry = {"doubt": f"values {doubt}"} if doubt else {}
        return {
            "file": str(source.path),
            "name": source.name,
            "seconds": seconds,
            "labels": labels,
            **problems,
            **doubt_entry,
        }

    def _write(self, source: Source, scan: Scan, masks: np.ndarray, probabilities: np.ndarray) -> dict[str, str]:
        output, plane = Path(self.options.output), self.task.plane
        below, stem = Path(source.name).parent, Path(source.name).name
        for label, mask, probability in zip(self.task.labels, masks, probabilities, strict=True):
            place = folder_in(output, label, *below.parts) / stem
            write_mask(scan, plane, mask, place)
            if self.options.probabilities:
                write_probabilities(scan, plane, probability, place.with_name(f"{place.name}_probability"))
        if not scan.files:
            return {}
        if scan.affine is not None:
            masks = np.stack([as_stored(scan, plane, mask).transpose(2, 1, 0) for mask in masks])
        try:
            write_dicom_seg(scan, masks, self.task.labels, folder_in(output, "dicom-seg", *below.parts) / stem)
        except AttributeError as error:
            return {"no_dicom_seg": f"the file has no {error.name}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"no_dicom_seg": first_line(error)}
        return {}


def segment_files(options: PredictOptions) -> None:
    """Segments each file, and writes its masks and the report.

    Raises:
        UserError: if there is nothing to segment, or the adapter cannot be used.
        SystemExit: with `NOT_ALL_READ` if some files could not be read.
    """
    prepare_process()
    sources, unknown = sources_to_segment(Path(options.images), skip=[Path(options.output)])
    method = METHODS[read_task(Path(options.adapter)).method]
    if method.prompt and method.prompt.from_expert:
        raise UserError(f"{method.title} needs a {method.prompt.name} in each label, which images alone do not give.")
    model, task = load_adapter(Path(options.adapter), options.backbone)
    segmenter = Segmenter(model.to(Accelerator().device).eval(), task, options)
    found: list[dict[str, Any]] = []
    unread = [f"{path} is not an image" for path in unknown if path.suffix.lower() not in TEXTS]
    for source in tqdm(sources, unit="file", disable=None):
        try:
            found.append(segmenter.segment(source))
        except UserError as error:
            unread.append(str(error))
    if options.report:
        write_json(Path(options.report), {"files": found, "not_read": unread})
    for entry in found:
        if "no_dicom_seg" in entry:
            print(
                f"note: {entry['file']} has masks, but no DICOM SEG: {entry['no_dicom_seg'].rstrip('.')}.",
                file=sys.stderr,
            )
        if "doubt" in entry:
            print(f"note: {entry['file']}: {entry['doubt'].rstrip('.')}.", file=sys.stderr)
    print(f"Wrote the masks of {len(found)} files for {', '.join(task.labels)} to {options.output}.")
    if unread:
        print(f"{len(unread)} files were not read:", *unread, sep="\n  ", file=sys.stderr)
        sys.exit(NOT_ALL_READ)


def _largest(mask: np.ndarray) -> np.ndarray:
    """Returns the largest 3D connected component of (N, H, W). Slices are adjacent. Empty masks are unchanged."""
    parts, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 3))
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count else mask


def _measure(scan: Scan, mask: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Measures a label: pixels, volume in ml or area in mm2 if the spacing is known, and mean probability."""
    pixels = int(mask.sum())
    found: dict[str, Any] = {"pixels": pixels}
    if scan.affine is not None:
        found["ml"] = round(pixels * float(np.prod(voxel_sizes(scan.affine))) / 1000, 6)
    elif scan.pixel_mm2 is not None:
        found["mm2"] = round(pixels * scan.pixel_mm2, 4)
    found["mean_probability"] = round(float(probability[mask].mean()), 4) if pixels else None
    return found
