"""One folder per patient or image, with the masks in a folder inside.

``p1/images/``, ``p1/masks/``; ``ID/images/ID.png`` with one mask per object in ``ID/masks/``, as in the Data Science
Bowl of 2018; ``s0000/ct.nii.gz`` with ``s0000/segmentations/LABEL.nii.gz``, as in TotalSegmentator.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sam_medical.common.errors import UserError
from sam_medical.data.annotations import LabelMaps, MaskOfEach
from sam_medical.data.base import require_label_names
from sam_medical.data.label_names import LabelNames
from sam_medical.data.matching import match
from sam_medical.data.parts import IMAGE_FOLDERS, MASK_FOLDERS, Pair, Part, folder_named, notes_on
from sam_medical.data.sources import Source, find_sources, folders_in, notes_on_left_out, plain

DEFAULT_LABEL = "lesion"


@dataclass(frozen=True)
class Patient:
    folder: Path
    images: Sequence[Source]
    masks: Sequence[Source]
    left_out: Sequence[Source] = ()

    def short(self, mask: Source) -> str:
        """Returns the name of a mask without the patient's name."""
        return mask.name.removeprefix(f"{plain(self.folder.name)}/")


def patient_folders(folder: Path) -> list[Path]:
    """Returns the sub-folders that contain a mask folder; nothing if the folder contains images or masks itself."""
    if not folder.is_dir() or folder_named(folder, IMAGE_FOLDERS) or folder_named(folder, MASK_FOLDERS):
        return []
    return [inner for inner in folders_in(folder) if folder_named(inner, MASK_FOLDERS)]


def read_patients(folder: Path, names: LabelNames | None, all_folders: Sequence[Path]) -> Part:
    """Reads all patients in a folder.

    Args:
        folder: The folder with one sub-folder per patient.
        names: The labels of labels.json; None without such a file.
        all_folders: The folders of all splits. A single split may lack a label.

    Raises:
        UserError: if an image has no mask.
    """
    found = [_read_patient(inner) for inner in patient_folders(folder)]
    patients, unknown = [patient for patient, _ in found], [path for _, some in found for path in some]
    left_out = notes_on_left_out([source for patient in patients for source in patient.left_out])
    part = Part((), [], left_out + notes_on(unknown), folder=folder)
    others = [inner.name for inner in folders_in(folder) if not folder_named(inner, MASK_FOLDERS)]
    if others:
        part.notes.append(f"{len(others)} folders hold no folder of masks, and are not read, first {others[0]}")
    every = [_read_patient(inner)[0] for other in all_folders for inner in patient_folders(other)]
    labels = [] if names else _labels_of_files(every or patients)
    if labels:
        require_label_names(labels, folder)
    part.labels = names.labels if names else labels or (DEFAULT_LABEL,)
    for patient in patients:
        part.pairs += _pairs_of(patient, names, labels)
    if not names and not labels:
        part.notes.append(
            f'without a labels.json the label is called "{DEFAULT_LABEL}"; give {{"NAME": 255}} to name it'
        )
    return part


def _read_patient(folder: Path) -> tuple[Patient, list[Path]]:
    masks_in = folder_named(folder, MASK_FOLDERS)
    assert masks_in is not None
    images_in = folder_named(folder, IMAGE_FOLDERS)
    images, unknown = find_sources(images_in or folder, skip=() if images_in else (masks_in,))
    masks, others = find_sources(masks_in)
    if not images:
        raise UserError(f"{folder} holds masks and no images; add them, or remove the folder.")
    name = plain(folder.name)
    left_out = [image for image in images if image.left_out]
    images = [replace(image, name=f"{name}/{image.name}") for image in images if not image.left_out]
    masks = [replace(mask, name=f"{name}/{mask.name}") for mask in masks]
    return Patient(folder, images, masks, left_out), unknown + others


def _labels_of_files(patients: Sequence[Patient]) -> list[str]:
    """Returns the labels if mask folders or files are named after them: names that repeat across patients."""
    folders = {
        patient.short(mask).split("/")[0]
        for patient in patients
        for mask in patient.masks
        if "/" in patient.short(mask)
    }
    if folders:
        return sorted(folders)
    if any(len(patient.images) != 1 for patient in patients) or all(len(patient.masks) < 2 for patient in patients):
        return []
    counts = Counter(patient.short(mask) for patient in patients for mask in patient.masks)
    return sorted(counts) if 2 * sum(count > 1 for count in counts.values()) > len(counts) else []


def _pairs_of(patient: Patient, names: LabelNames | None, labels: Sequence[str]) -> list[Pair]:
    masks_by_label: dict[str, list[Source]] = defaultdict(list)
    for mask in patient.masks:
        label = patient.short(mask).split("/")[0] if labels else ""
        masks_by_label[label].append(replace(mask, name=mask.name.replace(f"/{label}/", "/", 1)) if label else mask)
    matched = {label: _matched(patient.images, masks) for label, masks in masks_by_label.items()}
    pairs = []
    for image in patient.images:
        own = [matched[label].get(image.key, []) if label in matched else [] for label in labels or [""]]
        if not any(own):
            advice = image.hint or "add it, blank if there is nothing to see."
            raise UserError(f"{image.path} has no mask in {patient.folder}; {advice}")
        pairs.append(Pair(image, LabelMaps(own[0], names) if names else MaskOfEach(own)))
    return pairs


def _matched(images: Sequence[Source], masks: Sequence[Source]) -> dict[str, list[Source]]:
    """Returns the masks of each image: all masks for a single image, otherwise matched by name."""
    return {images[0].key: list(masks)} if len(images) == 1 else match(images, masks)
