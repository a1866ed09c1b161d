"""predict.py: masks on the grid of their image, and a report of unreadable files."""

import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from stand_ins import BrightPixels
from test_real_files import SHIPPED, TestDicom, as_codes, save, save_nifti, write_enhanced_ct

from sam_medical.adapters.task import Task
from sam_medical.cli import predict
from sam_medical.evaluation import segmenter


@pytest.fixture
def segment(run, tmp_path, monkeypatch):
    """Runs predict.py with `BrightPixels` as the model. Returns the folder of the bright label."""

    def go(images, image_size=32, intensity="auto", plane="axial", fit="stretch", tile=None, **options):
        task = Task("own", ("bright", "dark"), "lite-medsam", image_size, "minilm", intensity=intensity, plane=plane)
        task = Task(**{**task.__dict__, "fit": fit, "tile": tile})
        monkeypatch.setattr(segmenter, "read_task", lambda folder: task)
        monkeypatch.setattr(segmenter, "load_adapter", lambda folder, backbone=None: (BrightPixels(), task))
        run(predict, adapter=tmp_path, images=images, output=tmp_path / "masks", **options)
        return tmp_path / "masks" / "bright"

    return go


def scan(shape=(24, 16, 3)):
    values = np.random.default_rng(0).normal(0, 5, shape).astype(np.float32)
    values[3:9, 2:8, 1:] += 800
    return values


def same_place(mask, image):
    a, b = sitk.ReadImage(mask), sitk.ReadImage(image)
    assert a.GetSize() == b.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(a, name)(), getattr(b, name)(), atol=1e-6)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL"])
def test_masks_are_where_the_bright_voxels_are_in_every_orientation(segment, tmp_path, codes, plane):
    affine = np.array([[0.8, 0.1, 0, -10.0], [-0.1, 0.8, 0, 20], [0, 0, 3, -5], [0, 0, 0, 1]])
    image = as_codes(nib.Nifti1Image(scan((16, 16, 16)), affine), codes)
    (tmp_path / "images").mkdir()
    nib.save(image, tmp_path / "images" / "a.nii.gz")
    mask = nib.load(segment(tmp_path / "images", image_size=16, plane=plane) / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) > 400)
    np.testing.assert_array_equal(mask.affine, nib.load(tmp_path / "images/a.nii.gz").affine)
    same_place(tmp_path / "masks/bright/a.nii.gz", tmp_path / "images/a.nii.gz")


def test_header_codes_and_units_are_kept(segment, tmp_path):
    base = np.diag([1.0, 1, 3, 1])
    base[:3, 3] = (-10, -8, 5)
    other = base.copy()
    other[:3, 3] = 40
    (tmp_path / "images").mkdir()
    for name, sform, code in (("plain", base, 1), ("sform_differs", other, 2)):
        image = nib.Nifti1Image(scan(), sform)
        image.header.set_xyzt_units("mm", "sec")
        image.set_qform(base, 1)
        image.set_sform(sform, code)
        nib.save(image, tmp_path / f"images/{name}.nii.gz")
    image = nib.Nifti1Image(scan(), None)
    image.header["pixdim"][1:4] = (0.7, 0.7, 2.5)
    nib.save(image, tmp_path / "images/no_form.nii.gz")
    save_nifti(tmp_path / "images/four.nii.gz", scan()[..., None])
    folder = segment(tmp_path / "images")
    for name in ("plain", "sform_differs", "no_form", "four"):
        image, mask = nib.load(tmp_path / f"images/{name}.nii.gz"), nib.load(folder / f"{name}.nii.gz")
        for key in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
            np.testing.assert_array_equal(mask.header[key], image.header[key])
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
        same_place(folder / f"{name}.nii.gz", tmp_path / f"images/{name}.nii.gz")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_volumes_become_nifti_in_their_place(segment, tmp_path, ending):
    image = sitk.GetImageFromArray(scan().transpose(2, 1, 0))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-3, 4, 5.5))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, tmp_path / f"a{ending}")
    mask = segment(tmp_path / f"a{ending}") / "a.nii.gz"
    same_place(mask, tmp_path / f"a{ending}")
    assert sitk.GetArrayFromImage(sitk.ReadImage(mask)).sum() == pytest.approx(6 * 6 * 2, abs=16)


def test_pictures_are_written_upright_and_folders_in_folders_keep_their_names(segment, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((64, 48, 3), np.uint8)
    pixels[:20] = 250
    save(tmp_path / "new/visit.1/turned.jpg", pixels, exif=exif)
    save(tmp_path / "new/grey.png", pixels[..., 0])
    tifffile.imwrite(tmp_path / "new/stack.tif", np.stack([pixels[..., 0]] * 4), photometric="minisblack")
    folder = segment(tmp_path / "new")
    turned = Image.open(folder / "visit.1/turned.png")
    assert (
        turned.size == (64, 48) and np.asarray(turned)[:, 50:].min() == 255 and np.asarray(turned)[:, :30].max() == 0
    )
    assert Image.open(folder / "grey.png").size == (48, 64)
    assert tifffile.imread(folder / "stack.tif").shape == (4, 64, 48)


def test_what_is_not_read_is_named_at_the_end(segment, tmp_path, capsys):
    save(tmp_path / "new/good.png", np.zeros((8, 9), np.uint8))
    (tmp_path / "new/bad.png").write_bytes(b"no picture")
    (tmp_path / "new/slide.svs.part").write_bytes(b"?")
    (tmp_path / "new/notes.txt").write_text("of the visit")
    save_nifti(tmp_path / "new/time.nii.gz", np.zeros((4, 4, 4, 5), np.float32))
    with pytest.raises(SystemExit) as stop:
        segment(tmp_path / "new", report=tmp_path / "report.json")
    assert stop.value.code == 3
    said = capsys.readouterr().err
    for name in ("bad.png cannot be read", "slide.svs.part is not an image", "time.nii.gz is 4 x 4 x 4 x 5"):
        assert name in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["name"] for entry in report["files"]] == ["good"] and len(report["not_read"]) == 3
    assert (tmp_path / "masks/bright/good.png").is_file()


def test_probabilities_thresholds_components_and_the_report(segment, tmp_path):
    values = np.full((16, 16, 4), 0, np.float32)
    values[2:8, 2:8, 1:3], values[12:14, 12:14, 1], values[0, 0] = 100, 100, 55
    affine = np.diag([2.0, 2, 5, 1])
    save_nifti(tmp_path / "a.nii.gz", values, affine)
    how = {"image_size": 16, "intensity": "window:50,100", "report": tmp_path / "r.json"}
    folder = segment(tmp_path / "a.nii.gz", probabilities=True, **how)
    mask = np.asarray(nib.load(folder / "a.nii.gz").dataobj)
    np.testing.assert_array_equal(mask > 0, values > 50)
    probability = np.asarray(nib.load(folder / "a_probability.nii.gz").dataobj)
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-20 * (values / 100 - 0.5))), atol=1e-4)
    entry = json.loads((tmp_path / "r.json").read_text())["files"][0]
    found = entry["labels"]["bright"]
    assert found["pixels"] == 80 and found["ml"] == pytest.approx(80 * 20 / 1000) and entry["seconds"] > 0
    assert found["mean_probability"] == pytest.approx(probability[mask > 0].mean(), abs=1e-3)
    mask = np.asarray(nib.load(segment(tmp_path / "a.nii.gz", threshold=0.9, **how) / "a.nii.gz").dataobj)
    np.testing.assert_array_equal(mask > 0, values > 60)
    mask = np.asarray(nib.load(segment(tmp_path / "a.nii.gz", largest_component=True, **how) / "a.nii.gz").dataobj)
    assert mask.sum() == 72 and mask[2:8, 2:8, 1:3].all()


def test_tiles_and_padding_see_small_things_where_they_are(segment, tmp_path):
    pixels = np.zeros((70, 90), np.uint8)
    pixels[33:36, 61:64] = 255
    save(tmp_path / "a.png", pixels)
    tiled = np.asarray(Image.open(segment(tmp_path / "a.png", image_size=32, tile=32) / "a.png"))
    np.testing.assert_array_equal(tiled > 0, pixels > 0)
    wide = np.zeros((10, 40), np.uint8)
    wide[2:8, 4:20] = 255
    save(tmp_path / "wide.png", wide)
    padded = np.asarray(Image.open(segment(tmp_path / "wide.png", image_size=40, fit="pad") / "wide.png"))
    np.testing.assert_array_equal(padded, wide)


class TestDicomOut:
    def test_a_series_gives_nifti_in_place_and_a_seg_that_refers_to_it(self, segment, tmp_path):
        values = np.full((6, 16, 20), -100.0)
        values[2:5, 4:9, 10:15] = 200
        TestDicom().write(tmp_path / "in/p0", values)
        folder = segment(tmp_path / "in/p0", image_size=20)
        mask = nib.load(folder / "p0.nii.gz")
        names = sorted((tmp_path / "in/p0").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(name) for name in names])
        sitk.WriteImage(reader.Execute(), tmp_path / "series.nii.gz")
        same_place(folder / "p0.nii.gz", tmp_path / "series.nii.gz")
        np.testing.assert_array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0) > 0, values > 0)
        self.check_seg(tmp_path / "masks/dicom-seg/p0.dcm", names, values > 0)

    def check_seg(self, path, names, truth):
        seg, sources = pydicom.dcmread(path), [pydicom.dcmread(name) for name in names]
        assert seg.Modality == "SEG" and [segment.SegmentLabel for segment in seg.SegmentSequence] == [
            "bright",
            "dark",
        ]
        assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
        frames = {}
        for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
            if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 1:
                source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
                frames[source] = pixels > 0
        for source, plane in zip(sources, truth, strict=True):
            found = frames.get(source.SOPInstanceUID, np.zeros_like(plane))
            np.testing.assert_array_equal(found, plane)

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
    def test_frames_of_one_file_give_nifti_and_a_seg_that_refers_to_them(self, segment, tmp_path, order, capfd):
        truth = np.zeros((4, 16, 20), bool)
        for place in range(1, 4):
            truth[place, 2:9, 3 : 6 + 2 * place] = True
        (tmp_path / "in").mkdir()
        write_enhanced_ct(tmp_path / "in/a.dcm", np.where(truth, 200, -100), order)
        folder = segment(tmp_path / "in", image_size=20)
        mask = nib.load(folder / "a.nii.gz")
        np.testing.assert_array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0) > 0, truth)
        np.testing.assert_allclose(mask.affine[:3, 3], (10, 12, 0), atol=1e-5)
        seg = pydicom.dcmread(tmp_path / "masks/dicom-seg/a.dcm")
        for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
            if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 1:
                place = round(frame.PlanePositionSequence[0].ImagePositionPatient[2] / 5)
                np.testing.assert_array_equal(pixels > 0, truth[place])
        assert "arning" not in capfd.readouterr().err

    def test_files_that_pydicom_ships(self, segment, tmp_path):
        (tmp_path / "in").mkdir()
        for name in ("CT_small.dcm", "MR_small.dcm"):
            shutil.copy(SHIPPED / name, tmp_path / "in" / name)
        folder = segment(tmp_path / "in", image_size=128, report=tmp_path / "r.json")
        for name, side in (("CT_small", 128), ("MR_small", 64)):
            mask = np.asarray(Image.open(folder / f"{name}.png"))
            assert mask.shape == (side, side) and 0 < (mask > 0).mean() < 1
            self.check_seg(tmp_path / f"masks/dicom-seg/{name}.dcm", [tmp_path / "in" / f"{name}.dcm"], [mask > 0])
        found = json.loads((tmp_path / "r.json").read_text())["files"][0]["labels"]["bright"]
        spacing = pydicom.dcmread(SHIPPED / "CT_small.dcm").PixelSpacing
        assert found["mm2"] == pytest.approx(found["pixels"] * spacing[0] * spacing[1], rel=1e-4)
