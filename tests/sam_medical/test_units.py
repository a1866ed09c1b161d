"""Volumes with headers in microns or metres: geometry and measurements in millimetres."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from sam_medical.data.decoding import decode
from sam_medical.data.reading import check_grid, probe
from sam_medical.data.sources import source_of_file
from sam_medical.evaluation.mask_files import write_mask

UNITS = {"micron": 1000.0, "mm": 1.0, "meter": 0.001, "unknown": 1.0}


def save_in(path, unit, spacing=(0.5, 0.5, 1.5)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-10, 20, 30)
    affine[:3] *= UNITS[unit]
    image = nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), affine)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, path)


@pytest.mark.parametrize("unit", UNITS)
def test_spacing_is_in_millimetres_and_lies_where_itk_sees_it(tmp_path, unit):
    save_in(tmp_path / "scan.nii.gz", unit)
    scan = decode(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(np.diag(scan.affine), [0.5, 0.5, 1.5, 1], rtol=1e-5)
    np.testing.assert_allclose(probe(source_of_file(scan.path))[1], scan.affine)
    image = sitk.ReadImage(str(scan.path))
    np.testing.assert_allclose(image.GetSpacing(), [0.5, 0.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(image.GetOrigin(), [10, -20, 30], rtol=1e-5)
    write_mask(scan, "axial", np.zeros((4, 5, 6), bool), tmp_path / "mask")
    before, after = (nib.load(tmp_path / name).header for name in ("scan.nii.gz", "mask.nii.gz"))
    assert after.get_xyzt_units() == before.get_xyzt_units()
    np.testing.assert_array_equal(after.get_best_affine(), before.get_best_affine())


def test_a_mask_in_other_units_lies_on_its_image(tmp_path):
    for name, unit in {"image": "mm", "mask": "micron"}.items():
        save_in(tmp_path / f"{name}.nii.gz", unit)
    check_grid(source_of_file(tmp_path / "mask.nii.gz"), source_of_file(tmp_path / "image.nii.gz"), False)
