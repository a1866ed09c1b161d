"""Writes small synthetic datasets as files, for demos and tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image


def write_ct(folder: Path) -> None:
    random = np.random.default_rng(0)
    for patient in range(20):
        scan = random.normal(-1000, 10, (64, 64, 3))
        scan[8:56, 8:56] = random.normal(60, 10, (48, 48, 3))
        mask = np.zeros(scan.shape, np.uint8)
        row, column = random.integers(14, 40, 2)
        scan[row : row + 10, column : column + 10] -= 30
        mask[row : row + 10, column : column + 10] = 1
        scan[:3] = -3024
        scan[50, 50, 1] = 20000 if patient % 2 else 60
        _write_pair(folder, f"p{patient:02}", scan.astype(np.int16), mask, np.eye(4))
    _write_labels(folder, "tumor")


def write_orientations(folder: Path) -> None:
    affine = np.diag([1.0, 1, 4, 1])
    for patient in range(20):
        _write_pair(folder, f"p{patient:02}", *_scan_with_two_alike(patient), affine)
    _write_labels(folder, "organ")
    scan, mask = _scan_with_two_alike(99)
    (folder / "new").mkdir()
    for codes in ("RAS", "LPS", "PIR"):
        _write_as(codes, nib.Nifti1Image(scan, affine), folder / f"new/{codes.lower()}.nii.gz")
    nib.save(nib.Nifti1Image(mask, affine), folder / "truth.nii.gz")


def _scan_with_two_alike(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a body with two equal organs, of which only the anterior one is labelled."""
    random = np.random.default_rng(seed)
    scan = random.normal(0, 20, (64, 64, 4)).astype(np.float32)
    mask = np.zeros(scan.shape, np.uint8)
    x, y = np.mgrid[:64, :64]
    column, row = random.integers(22, 42), random.integers(44, 50)
    scan[((x - 32) / 28) ** 2 + ((y - 32) / 28) ** 2 < 1] += 200
    for centre, is_ours in ((row, True), (64 - row, False)):
        organ = (x - column) ** 2 + (y - centre) ** 2 < 49
        scan[organ] += 300
        if is_ours:
            mask[organ] = 1
    return scan, mask


def write_small_lesions(folder: Path) -> None:
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(10):
        mask = np.zeros((584, 565), np.uint8)
        for row, column in random.integers(20, 540, (12, 2)):
            mask[row : row + 3, column : column + 3] = 1
        pixels = random.integers(90, 140, (584, 565, 3))
        pixels[mask == 1] = (150, 20, 20)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/f{index}.png")
        Image.fromarray(mask).save(folder / f"masks/f{index}.png")
    _write_labels(folder, "microaneurysm")


def _write_pair(folder: Path, name: str, scan: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> None:
    for kind, values in {"images": scan, "masks": mask}.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), folder / kind / f"{name}.nii.gz")


def _write_as(codes: str, image: nib.Nifti1Image, path: Path) -> None:
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)), path)


def _write_labels(folder: Path, label: str) -> None:
    (folder / "labels.json").write_text(json.dumps({label: 1}))


WRITERS: dict[str, Callable[[Path], None]] = {
    "ct": write_ct,
    "orientations": write_orientations,
    "small-lesions": write_small_lesions,
}
