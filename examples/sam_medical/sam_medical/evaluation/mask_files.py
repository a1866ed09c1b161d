"""Writes masks and probabilities as files on the grid of their image."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image

from sam_medical.common.files import replacing_file
from sam_medical.data.decoding import NIFTI, Scan, suffix_of
from sam_medical.data.geometry import turn_to_plane, turned_back
from sam_medical.data.quiet import pydicom, simpleitk

WHITE = 255
WHITE_16 = 65535


def write_mask(scan: Scan, plane: str, masks: np.ndarray, path: Path) -> None:
    """Writes the masks of a scan: NIfTI with 0 and 1 for volumes, PNG or TIFF with 0 and 255 otherwise.

    Args:
        scan: The segmented scan.
        plane: The plane of its slices.
        masks: Bool masks (N, H, W), one per slice.
        path: The output file without extension.
    """
    if scan.affine is not None:
        _write_volume(scan, as_stored(scan, plane, masks).astype(np.uint8), path)
    else:
        _write_pictures(scan, masks.astype(np.uint8) * np.uint8(WHITE), path)


def write_probabilities(scan: Scan, plane: str, probabilities: np.ndarray, path: Path) -> None:
    """Writes probabilities (N, H, W): float NIfTI for volumes, otherwise 16-bit images scaled by 65535."""
    if scan.affine is not None:
        _write_volume(scan, as_stored(scan, plane, probabilities).astype(np.float32), path)
    else:
        _write_pictures(scan, np.rint(probabilities * WHITE_16).astype(np.uint16), path)


def as_stored(scan: Scan, plane: str, slices: np.ndarray) -> np.ndarray:
    """Returns slices (N, H, W) in the volume's stored axes, (X, Y, Z)."""
    assert scan.affine is not None
    return np.ascontiguousarray(turned_back(slices, turn_to_plane(scan.affine, plane)))


def _write_pictures(scan: Scan, pictures: np.ndarray, path: Path) -> None:
    if scan.is_stack:
        import tifffile

        with replacing_file(_with_ending(path, ".tif")) as temporary:
            tifffile.imwrite(temporary, pictures, photometric="minisblack", compression="zlib")
        return
    with replacing_file(_with_ending(path, ".png")) as temporary:
        Image.fromarray(pictures[0]).save(temporary, format="PNG")


def _write_volume(scan: Scan, values: np.ndarray, path: Path) -> None:
    path = _with_ending(path, ".nii.gz")
    with replacing_file(path) as temporary:  # it keeps the suffix .nii.gz, by which both libraries compress
        if suffix_of(scan.path.name) in NIFTI and not scan.files:
            _write_like_nifti(scan, values, temporary)
        else:
            _write_with_itk(scan, values, temporary)


def _write_like_nifti(scan: Scan, values: np.ndarray, path: Path) -> None:
    """Writes NIfTI with the header of the image: codes, units, and both sform and qform."""
    import nibabel

    source: Any = nibabel.load(scan.path)
    values = values.reshape(source.shape)
    if not isinstance(source, nibabel.Nifti1Pair):
        nibabel.save(nibabel.Nifti1Image(values, source.affine), path)
        return
    header = source.header.copy()
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    header.set_intent("none")
    kind = nibabel.Nifti2Image if isinstance(source, nibabel.Nifti2Pair) else nibabel.Nifti1Image
    nibabel.save(kind(values, None, header), path)


def _write_with_itk(scan: Scan, values: np.ndarray, path: Path) -> None:
    itk = simpleitk()
    assert scan.affine is not None
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine
    spacing = voxel_sizes(affine)
    image = itk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing([float(side) for side in spacing])
    image.SetOrigin([float(place) for place in affine[:3, 3]])
    image.SetDirection([float(part) for part in (affine[:3, :3] / spacing).ravel()])
    itk.WriteImage(image, str(path))


def write_dicom_seg(scan: Scan, volumes: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Writes a DICOM SEG that references its images, one segment per label.

    Args:
        scan: A DICOM series, or one DICOM image.
        volumes: Bool masks (K, N, H, W), in the order of the files.
        labels: The K label names.
        path: The output file without extension.
    """
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    if scan.frames:
        volumes = volumes[:, np.argsort(scan.frames)]
    images = [pydicom().dcmread(file, force=True) for file in scan.files]
    for image in images:  # a SEG requires these attributes, which some files lack; they must agree within a series
        image.setdefault("FrameOfReferenceUID", generate_uid(entropy_srcs=[str(image.SeriesInstanceUID)]))
        if scan.affine is not None:
            image.setdefault("SliceThickness", float(voxel_sizes(scan.affine)[2]))
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="svdtune", version=version("svdtune"), family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label[:64],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(labels, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=np.ascontiguousarray(volumes.transpose(1, 2, 3, 0)),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="svdtune",
        manufacturer_model_name="S-SAM",
        software_versions=version("svdtune"),
        device_serial_number="0",
    )
    with replacing_file(_with_ending(path, ".dcm")) as temporary:
        segmentation.save_as(temporary)


def _with_ending(path: Path, ending: str) -> Path:
    """Appends an extension. `Path.with_suffix` would cut names that contain a dot."""
    return path.with_name(path.name + ending)
