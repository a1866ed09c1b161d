"""A trained adapter as an object that segments files and arrays: what `sam_medical.load` returns.

Shape legend: K labels, N slices, H W pixels of a slice, X Y Z voxels as a volume's file stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from nibabel.affines import voxel_sizes
from PIL import Image
from scipy import ndimage
from torch import nn

from sam_medical.adapters.adapter import load_adapter
from sam_medical.adapters.task import Task, read_task
from sam_medical.common.errors import UserError, first_line
from sam_medical.common.files import folder_in
from sam_medical.common.process import prepare_process
from sam_medical.data.base import Sample
from sam_medical.data.decoding import Scan
from sam_medical.data.doubts import doubt_about
from sam_medical.data.folder import Slices, sources_to_segment
from sam_medical.data.intensity import parse_intensity, to_channels
from sam_medical.data.loading import evaluation_loader
from sam_medical.data.reading import as_read, image_scan_of, scan_of
from sam_medical.data.sources import Source
from sam_medical.evaluation.mask_files import as_stored, write_dicom_seg, write_mask, write_probabilities
from sam_medical.evaluation.prediction import predict_logits
from sam_medical.evaluation.report import overlay
from sam_medical.methods import METHODS


@dataclass(frozen=True)
class Segmentation:
    """What a segmenter found in one picture, stack or volume.

    Attributes:
        name: What its files are called.
        labels: The names of the labels, K.
        masks_of_slices: Bool, (K, N, H, W), in the plane that the adapter was trained on.
        probabilities_of_slices: float32, of the same shape.
        doubt: Why the values of the image look wrong to the adapter; empty if they do not.
    """

    name: str
    labels: tuple[str, ...]
    masks_of_slices: np.ndarray
    probabilities_of_slices: np.ndarray
    doubt: str
    _scan: Scan
    _plane: str
    _slices: Sequence[Sample]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Per label a bool mask of the image's own shape: (H, W), a stack's (N, H, W), or a volume's (X, Y, Z)."""
        return {label: self._in_place(mask) for label, mask in zip(self.labels, self.masks_of_slices, strict=True)}

    @property
    def probabilities(self) -> dict[str, np.ndarray]:
        """Per label the probability of each pixel, float32, of the same shape as the masks."""
        pairs = zip(self.labels, self.probabilities_of_slices, strict=True)
        return {label: self._in_place(probability) for label, probability in pairs}

    @property
    def affine(self) -> np.ndarray | None:
        """Voxel indices to millimetres, RAS+, (4, 4); None for pictures."""
        return self._scan.affine

    @cached_property
    def measures(self) -> dict[str, dict[str, Any]]:
        """Per label its ``pixels``, ``ml`` of a volume or ``mm2`` of a picture whose file gives the spacing, and the
        ``mean_probability`` of its pixels, None if there are none."""
        pairs = zip(self.labels, self.masks_of_slices, self.probabilities_of_slices, strict=True)
        return {label: self._measure(mask, probability) for label, mask, probability in pairs}

    def save(self, folder: str | Path, probabilities: bool = False) -> dict[str, str]:
        """Writes the masks, a sub-folder per label: NIfTI for a volume, else pictures; for DICOM a DICOM SEG, too.

        Args:
            folder: Where the files go; it is made if it is not there.
            probabilities: Whether to write the probabilities beside the masks.

        Returns:
            Under ``no_dicom_seg`` why no DICOM SEG could be written, if that is so.
        """
        below, stem = Path(self.name).parent, Path(self.name).name
        pairs = zip(self.labels, self.masks_of_slices, self.probabilities_of_slices, strict=True)
        for label, mask, probability in pairs:
            place = folder_in(Path(folder), label, *below.parts) / stem
            write_mask(self._scan, self._plane, mask, place)
            if probabilities:
                write_probabilities(self._scan, self._plane, probability, place.with_name(f"{stem}_probability"))
        return self._save_dicom_seg(Path(folder), below, stem) if self._scan.files else {}

    def overlay(self, number: int | None = None) -> Image.Image:
        """The image of one slice with its masks painted on it, and a legend.

        Args:
            number: Of the slice, from 0; by default the one with most pixels of any label.
        """
        if number is None:
            number = int(self.masks_of_slices.sum((0, 2, 3)).argmax())
        return overlay(self._slices[number].image, self.masks_of_slices[:, number], self.labels)

    def _in_place(self, slices: np.ndarray) -> np.ndarray:
        if self.affine is not None:
            return as_stored(self._scan, self._plane, slices)
        return slices if self._scan.is_stack else slices[0]

    def _measure(self, mask: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
        pixels = int(mask.sum())
        found: dict[str, Any] = {"pixels": pixels}
        if self.affine is not None:
            found["ml"] = round(pixels * float(np.prod(voxel_sizes(self.affine))) / 1000, 6)
        elif self._scan.pixel_mm2 is not None:
            found["mm2"] = round(pixels * self._scan.pixel_mm2, 4)
        found["mean_probability"] = round(float(probability[mask].mean()), 4) if pixels else None
        return found

    def _save_dicom_seg(self, folder: Path, below: Path, stem: str) -> dict[str, str]:
        masks = self.masks_of_slices
        if self.affine is not None:
            masks = np.stack([as_stored(self._scan, self._plane, mask).transpose(2, 1, 0) for mask in masks])
        try:
            write_dicom_seg(self._scan, masks, self.labels, folder_in(folder, "dicom-seg", *below.parts) / stem)
        except AttributeError as error:
            return {"no_dicom_seg": f"the file does not say its {error.name}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"no_dicom_seg": first_line(error)}
        return {}


class Segmenter:
    """A trained model that segments pictures, volumes, DICOM series and arrays.

    Attributes:
        task: What the adapter was trained for.
        labels: The names of its labels.
        threshold: Probability above which a pixel belongs to a label.
        largest_component: Whether only the largest connected part of each label is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        threshold: float = 0.5,
        largest_component: bool = False,
        batch_size: int = 4,
    ) -> None:
        self.model = model.eval()
        self.task = task
        self.labels = task.labels
        self.threshold = threshold
        self.largest_component = largest_component
        self.batch_size = batch_size

    def segment(self, image: str | Path | np.ndarray) -> Segmentation:
        """The masks of one picture, stack, volume or DICOM series, or of a picture as an array.

        Args:
            image: A file, a folder of one DICOM series, or an array (H, W) or (H, W, 3) whose values are as those of
                the images that the adapter was trained on.

        Raises:
            UserError: if it cannot be read, or a folder holds more than one image.
        """
        if isinstance(image, np.ndarray):
            return self._segment_array(image)
        sources, _ = sources_to_segment(Path(image))
        if len(sources) > 1:
            raise UserError(f"{image} holds {len(sources)} images; give one of them, or use segment_all.")
        return self.segment_source(sources[0])

    def segment_all(self, folder: str | Path) -> Iterator[Segmentation]:
        """The masks of every image in a folder and its folders, one after the other.

        Raises:
            UserError: at the first image that cannot be read, or if there is none.
        """
        sources, _ = sources_to_segment(Path(folder))
        yield from map(self.segment_source, sources)

    def segment_source(self, source: Source) -> Segmentation:
        """The masks of what `sources_to_segment` found."""
        reading = self.task.reading
        slices = Slices(source, reading)
        doubt = doubt_about(image_scan_of(source, reading), reading)
        return self._segment_slices(source.name, slices, scan_of(source), f"values {doubt}" if doubt else "")

    def _segment_array(self, array: np.ndarray) -> Segmentation:
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
            raise UserError(f"an array of shape {array.shape} is no picture; give (H, W) or (H, W, 3).")
        reading, scan = self.task.reading, Scan(Path("array"), array[None])
        seen = as_read(scan, reading)
        channels = to_channels(seen.values[0], seen, parse_intensity(reading.intensity), reading.modality)
        doubt = doubt_about(seen, reading)
        sample = Sample("array", channels, np.zeros((0, *channels.shape[:2]), dtype=bool))
        return self._segment_slices("array", [sample], scan, f"values {doubt}" if doubt else "")

    def _segment_slices(self, name: str, slices: Any, scan: Scan, doubt: str) -> Segmentation:
        batches = evaluation_loader(slices, self.task.framing, self.batch_size)
        logits = [logits.cpu() for _, logits in predict_logits(self.model, batches)]
        probabilities = torch.sigmoid(torch.stack(logits, dim=1)).numpy()  # (K, N, H, W)
        masks = probabilities > self.threshold
        if self.largest_component:
            masks = np.stack([largest_part(mask) for mask in masks])
        return Segmentation(name, self.labels, masks, probabilities, doubt, scan, self.task.plane, slices)


def load(
    adapter: str | Path,
    backbone: str | None = None,
    *,
    device: str | torch.device | None = None,
    threshold: float = 0.5,
    largest_component: bool = False,
    batch_size: int = 4,
) -> Segmenter:
    """A segmenter from an adapter's folder.

    Args:
        adapter: The folder that `sam-medical train` wrote, RUN/adapter.
        backbone: Where the pretrained weights are, if no longer where the adapter was trained.
        device: Where to compute; by default a GPU if there is one.
        threshold: Probability above which a pixel belongs to a label.
        largest_component: Whether to keep only the largest connected part of each label.
        batch_size: Slices or pictures per batch.

    Raises:
        UserError: if files are missing or damaged, the base model is another one, or the method needs a point or box
            in each label.
    """
    prepare_process()
    method = METHODS[read_task(Path(adapter)).method]
    if method.prompt and method.prompt.from_expert:
        raise UserError(f"{method.title} needs a {method.prompt.name} in each label, which images alone do not give.")
    model, task = load_adapter(Path(adapter), backbone)
    return Segmenter(model.to(device or Accelerator().device), task, threshold, largest_component, batch_size)


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of (N, H, W), whose slices touch; a mask without parts as it is."""
    parts, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 3))
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count else mask
