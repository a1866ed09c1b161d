"""Files from hospitals and labs: read as their viewers show them, or rejected in one line."""

import json
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter

from sam_medical.common.errors import UserError
from sam_medical.data.decoding import decode
from sam_medical.data.geometry import PLANES
from sam_medical.data.intensity import settle
from sam_medical.data.opening import open_dataset, settle_reading
from sam_medical.data.reading import Reading
from sam_medical.data.sources import find_sources, source_of_file

AUTO = Reading("auto")
SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"


def disk(height=48, width=64, row=20, column=24, radius=10):
    y, x = np.mgrid[:height, :width]
    return (y - row) ** 2 + (x - column) ** 2 < radius**2


def save(path, array, mode=None, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.ascontiguousarray(array), mode)
    image.save(path, **how)


def save_nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def say(root, content, name="labels.json", encoding="utf-8"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


def open_own(root, split="train", reading=AUTO):
    return open_dataset("own", str(root), split, reading=reading)


def samples_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


def contrast(sample, label=0):
    mask, grey = sample.masks[label], sample.image.mean(2)
    return grey[mask].mean() - grey[~mask].mean()


def as_codes(image, codes):
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    return image.as_reoriented(turn)


def group(**elements):
    dataset = pydicom.Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def write_enhanced_ct(path, scan, order, tilt=0.0):
    """One file of several frames in any order, in Hounsfield units with 1024 added."""
    frames = [
        group(
            PlanePositionSequence=[group(ImagePositionPatient=[-10, -12 + tilt * place, 5.0 * place])],
            FrameContentSequence=[
                group(StackID="1", InStackPositionNumber=place + 1, DimensionIndexValues=[1, place + 1])
            ],
        )
        for place in order
    ]
    shared = group(
        PixelMeasuresSequence=[group(PixelSpacing=[0.9, 0.8], SliceThickness=5, SpacingBetweenSlices=5)],
        PlaneOrientationSequence=[group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelValueTransformationSequence=[group(RescaleIntercept=-1024, RescaleSlope=1, RescaleType="HU")],
    )
    uids = {name: pydicom.uid.generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    kind = "1.2.840.10008.5.1.4.1.1.2.1"
    file = group(
        **uids,
        SOPClassUID=kind,
        FrameOfReferenceUID=pydicom.uid.generate_uid(),
        Modality="CT",
        NumberOfFrames=len(order),
        Rows=scan.shape[1],
        Columns=scan.shape[2],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=0,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
        PixelData=(scan[list(order)] + 1024).astype(np.uint16).tobytes(),
        **dict.fromkeys(("PatientID", "PatientName", "StudyID", "StudyDate", "StudyTime", "AccessionNumber"), ""),
        **dict.fromkeys(("PatientBirthDate", "PatientSex", "ReferringPhysicianName"), ""),
    )
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID, file.file_meta.MediaStorageSOPInstanceUID = kind, file.SOPInstanceUID
    file.save_as(path, enforce_file_format=True)


class TestIntensities:
    @pytest.fixture
    def ct(self, tmp_path):
        """Soft tissue of 60 HU with a tumor of 30 in air; padding of -3024, and metal in every other patient."""
        random = np.random.default_rng(0)
        for patient in range(10):
            scan = random.normal(-1000, 10, (32, 32, 2))
            scan[4:28, 4:28] = random.normal(60, 10, (24, 24, 2))
            mask = np.zeros(scan.shape, np.uint8)
            scan[10:16, 12:18] -= 30
            mask[10:16, 12:18] = 1
            scan[:2] = -3024
            scan[25, 25, 1] = 20000 if patient % 2 else 60
            save_nifti(tmp_path / f"images/p{patient}.nii.gz", scan.astype(np.int16))
            save_nifti(tmp_path / f"masks/p{patient}.nii.gz", mask)
        say(tmp_path, {"tumor": 1})
        return tmp_path

    def test_ct_is_known_by_its_values_and_gets_the_soft_tissue_window(self, ct):
        dataset = open_own(ct)
        assert settle_reading(dataset).intensity == "auto:ct"
        for sample in samples_of(dataset):
            inside = sample.image.mean(2)[sample.masks[0]].mean()
            assert inside == pytest.approx((30 + 160) / 400, abs=0.01)
            assert sample.image.mean(2)[5:9, 5:9].mean() == pytest.approx((60 + 160) / 400, abs=0.02)

    def test_windows_may_be_given_as_numbers_or_names_and_as_three_channels(self, ct):
        tissue, tumor, air = (0, 6, 6), (0, 12, 14), (0, 30, 30)

        def grey_at(intensity, place):
            index, row, column = place
            return open_own(ct, reading=Reading(intensity))[index].image[31 - column, row]

        hu = nib.load(ct / "images/p0.nii.gz").get_fdata()[6, 6, 0]
        np.testing.assert_allclose(grey_at("window:0,1000", tissue), [(hu + 500) / 1000] * 3, rtol=1e-5)
        channels = grey_at("window:lung;40,400;window:bone", tissue)
        expected = [(hu + 1350) / 1500, (hu + 160) / 400, (hu + 500) / 1800]
        np.testing.assert_allclose(channels, expected, rtol=1e-5)
        assert grey_at("window:soft-tissue", air).tolist() == [0, 0, 0]
        assert grey_at("window:soft-tissue", tumor)[0] < grey_at("window:soft-tissue", tissue)[0]
        for wrong in ("window:40", "window:1,2,3", "window:40,-3", "percentile:9,3", "hounsfield", "window:lung,bone"):
            with pytest.raises(UserError, match=r"intensity is .* must be auto, window:40,400"):
                Reading(wrong)

    def test_no_single_voxel_decides_what_is_white(self, tmp_path):
        random = np.random.default_rng(0)
        scan = random.normal(500, 50, (40, 40, 4)).astype(np.float32)
        scan[:10] = 0
        scan[20, 20, 2] = 1e6
        save_nifti(tmp_path / "mr.nii.gz", scan)
        grey = _read(tmp_path / "mr.nii.gz", 2)
        assert 0.4 < grey[:, 10:].mean() < 0.6 or 0.5 < np.median(grey[:, 10:]) < 0.9
        assert grey[:, 10:].std() > 0.05 and grey[:, :10].max() == 0
        np.testing.assert_array_equal(_read(tmp_path / "mr.nii.gz", 1)[:, :10], 0)

    def test_mri_with_negative_values_and_eight_bits_are_no_ct(self, tmp_path):
        random = np.random.default_rng(0)
        save_nifti(tmp_path / "z.nii.gz", random.normal(0, 1, (16, 16, 3)).astype(np.float32))
        save_nifti(tmp_path / "byte.nii.gz", random.integers(0, 99, (16, 16, 3)).astype(np.uint8))
        scans = [decode(tmp_path / name) for name in ("z.nii.gz", "byte.nii.gz")]
        assert settle("auto", [(scan, "") for scan in scans]) == "auto:percentile"
        assert settle("auto", [(scans[0], "CT")]) == "auto:ct" and settle("auto", [(scans[1], "")]) == "auto"
        byte = np.asarray(nib.load(tmp_path / "byte.nii.gz").dataobj)[3, 4, 1]
        assert _read(tmp_path / "byte.nii.gz", 1)[15 - 4, 3] == pytest.approx(byte / 255)

    @pytest.mark.parametrize("deep", [np.uint16, np.int16, np.float32])
    def test_deep_pictures_keep_their_contrast_beside_one_bright_pixel(self, tmp_path, deep):
        values = np.where(disk(), 900, 600).astype(deep)
        values += np.random.default_rng(0).integers(0, 50, values.shape).astype(deep)
        values[0, 0] = 30000
        tifffile.imwrite(tmp_path / "deep.tif", values)
        grey = _read(tmp_path / "deep.tif", None)
        assert grey[disk()].mean() - grey[~disk()].mean() > 0.5

    @pytest.mark.parametrize("store", [lambda hu: hu.astype(np.int16).view(np.uint16), lambda hu: hu + 32768])
    @pytest.mark.parametrize("noise", [8, 0], ids=["noisy air", "air of one value"])
    def test_hounsfield_units_in_png_are_found_where_they_were_put(self, tmp_path, store, noise):
        random = np.random.default_rng(0)
        hu = np.full((40, 40), -1000) + random.integers(-noise, noise + 1, (40, 40))
        hu[5:35, 5:35] = 60 + random.integers(-8, 9, (30, 30))
        save(tmp_path / "ct.png", store(hu).astype(np.uint16))
        grey = _read(tmp_path / "ct.png", None)
        np.testing.assert_allclose(grey, ((hu + 160) / 400).clip(0, 1), atol=1e-5)
        bright = np.where(disk(), 65535, 900).astype(np.uint16)  # no CT, and not wrapped
        save(tmp_path / "spot.png", bright)
        np.testing.assert_array_equal(_read(tmp_path / "spot.png", None), disk())

    def test_grey_in_eight_bits_is_not_changed_by_auto(self, tmp_path):
        values = np.arange(40, 70, dtype=np.uint8).reshape(5, 6)
        save(tmp_path / "a.png", values)
        np.testing.assert_array_equal(_read(tmp_path / "a.png", None), values / np.float32(255))


def _read(path, number, reading=AUTO):
    from sam_medical.data.reading import read_slice

    return read_slice(source_of_file(path), number, reading)[..., 0]


class TestGeometry:
    AFFINE = np.array([[0.8, 0, 0, -10.0], [0, 0.9, 0, 20], [0, 0, 3, -5], [0, 0, 0, 1]])

    def scan_and_mask(self, seed=0, shape=(20, 16, 5)):
        random = np.random.default_rng(seed)
        scan, mask = random.normal(0, 30, shape).astype(np.float32), np.zeros(shape, np.uint8)
        mask[3:9, 2:7, 1:3] = 1
        scan[mask > 0] += 800
        return nib.Nifti1Image(scan, self.AFFINE), nib.Nifti1Image(mask, self.AFFINE)

    def write(self, root, image_codes="RAS", mask_codes="RAS", change=None):
        for patient in range(10):
            image, mask = self.scan_and_mask(patient)
            image, mask = as_codes(image, image_codes), as_codes(mask, mask_codes)
            mask = change(mask) if change else mask
            for kind, file in {"images": image, "masks": mask}.items():
                (root / kind).mkdir(parents=True, exist_ok=True)
                nib.save(file, root / kind / f"p{patient}.nii.gz")
        say(root, {"lesion": 1})

    @pytest.mark.parametrize("codes", ["LPS", "PIR", "ASL", "RAS", "SRA"])
    def test_a_mask_is_brought_to_its_images_orientation(self, tmp_path, codes):
        self.write(tmp_path, mask_codes=codes)
        present = [sample for sample in samples_of(open_own(tmp_path)) if sample.masks.any()]
        assert len(present) == 7 * 2 and min(map(contrast, present)) > 0.7

    @pytest.mark.parametrize("plane", PLANES)
    @pytest.mark.parametrize("codes", ["LPS", "PIR", "ASL"])
    def test_a_scan_looks_the_same_however_it_is_stored(self, tmp_path, codes, plane):
        image, _ = self.scan_and_mask()
        nib.save(image, tmp_path / "ras.nii.gz")
        nib.save(as_codes(image, codes), tmp_path / "other.nii.gz")
        reading = Reading("auto", plane)
        for number in (0, 3):
            np.testing.assert_allclose(
                _read(tmp_path / "ras.nii.gz", number, reading),
                _read(tmp_path / "other.nii.gz", number, reading),
                atol=1e-6,
            )

    def test_planes_are_cut_across_their_axes_with_the_top_above(self, tmp_path):
        scan = np.zeros((4, 5, 6), np.uint8)
        scan[3, 4, 5] = 255  # right, front, top
        save_nifti(tmp_path / "a.nii.gz", scan)
        wanted = {"axial": ((5, 4), 5, (0, 3)), "coronal": ((6, 4), 4, (0, 3)), "sagittal": ((6, 5), 3, (0, 0))}
        for plane, (size, number, place) in wanted.items():
            grey = _read(tmp_path / "a.nii.gz", number, Reading("auto", plane))
            assert grey.shape == size and np.argwhere(grey).tolist() == [list(place)]

    @pytest.mark.parametrize(
        "shift, shape, distance",
        [((4, 0, 3), None, "5 mm"), ((0, 0, 0), (20, 16, 6), "3 mm")],
        ids=["moved", "one slice more"],
    )
    def test_a_mask_elsewhere_is_an_error_and_can_be_resampled(self, tmp_path, shift, shape, distance):
        def change(mask):
            affine = mask.affine.copy()
            affine[:3, 3] += shift
            values = np.zeros(shape or mask.shape, np.uint8)
            values[:, :, :5] = np.asarray(mask.dataobj)
            return nib.Nifti1Image(values, affine)

        self.write(tmp_path, mask_codes="RAS", change=change)
        with pytest.raises(UserError, match=rf"masks/p0\.nii\.gz does not lie on its image .*p0\.nii\.gz.*{distance}"):
            open_own(tmp_path)
        reading = Reading("auto", resample_masks=True)
        total = sum(sample.masks.sum() for sample in samples_of(open_own(tmp_path, reading=reading)))
        assert total == 7 * 6 * 5 * 2

    def test_finer_masks_are_taken_at_the_nearest_voxel(self, tmp_path):
        def change(mask):
            fine = np.asarray(mask.dataobj).repeat(2, 0).repeat(2, 1)
            affine = mask.affine @ np.diag([0.5, 0.5, 1, 1])
            affine[:3, 3] = mask.affine[:3, 3] - 0.25 * (mask.affine[:3, 0] + mask.affine[:3, 1])
            return nib.Nifti1Image(fine, affine)

        self.write(tmp_path, change=change)
        with pytest.raises(UserError, match="40 x 32 x 5 voxels and 20 x 16 x 5"):
            open_own(tmp_path)
        dataset = open_own(tmp_path, reading=Reading("auto", resample_masks=True))
        assert min(contrast(sample) for sample in samples_of(dataset) if sample.masks.any()) > 0.7

    def test_oblique_scans_keep_their_masks(self, tmp_path):
        tilt = np.radians(20)
        turn = np.eye(4)
        turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
        for patient in range(10):
            image, mask = self.scan_and_mask(patient)
            tilted = turn @ self.AFFINE
            for kind, file, codes in (("images", image, "RAS"), ("masks", mask, "LPS")):
                (tmp_path / kind).mkdir(exist_ok=True)
                other = as_codes(nib.Nifti1Image(np.asarray(file.dataobj), tilted), codes)
                nib.save(other, tmp_path / kind / f"p{patient}.nii.gz")
        say(tmp_path, {"lesion": 1})
        present = [sample for sample in samples_of(open_own(tmp_path)) if sample.masks.any()]
        assert len(present) == 14 and min(map(contrast, present)) > 0.7

    @pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nii"])
    def test_other_formats_of_volumes_lie_where_nifti_lies(self, tmp_path, ending):
        for patient in range(10):
            image, mask = self.scan_and_mask(patient)
            (tmp_path / "images").mkdir(exist_ok=True)
            nib.save(image, tmp_path / "image.nii.gz")
            sitk.WriteImage(sitk.ReadImage(tmp_path / "image.nii.gz"), tmp_path / f"images/p{patient}{ending}")
            save_nifti(tmp_path / f"masks/p{patient}.nii.gz", np.asarray(mask.dataobj), self.AFFINE)
        say(tmp_path, {"lesion": 1})
        dataset = open_own(tmp_path)
        assert dataset.notes == []
        assert min(contrast(sample) for sample in samples_of(dataset) if sample.masks.any()) > 0.7

    def test_a_trailing_axis_is_squeezed_and_time_is_an_error(self, tmp_path):
        image, mask = self.scan_and_mask()
        for patient in range(10):
            save_nifti(tmp_path / f"images/p{patient}.nii.gz", np.asarray(image.dataobj)[..., None], self.AFFINE)
            save_nifti(tmp_path / f"masks/p{patient}.nii.gz", np.asarray(mask.dataobj), self.AFFINE)
        say(tmp_path, {"lesion": 1})
        assert len(open_own(tmp_path)) == 7 * 5
        save_nifti(tmp_path / "images/p0.nii.gz", np.zeros((20, 16, 5, 4), np.float32), self.AFFINE)
        with pytest.raises(UserError, match=r"p0\.nii\.gz is 20 x 16 x 5 x 4: several channels or time points; save"):
            open_own(tmp_path)

    def test_volumes_in_colour_are_read_in_colour(self, tmp_path):
        scan = np.zeros((6, 5, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
        scan["R"][1:3, 1:3] = 200
        save_nifti(tmp_path / "rgb.nii.gz", scan)
        from sam_medical.data.reading import read_slice

        picture = read_slice(source_of_file(tmp_path / "rgb.nii.gz"), 0, AUTO)
        assert picture.shape == (5, 6, 3)
        np.testing.assert_allclose(picture.max((0, 1)), [200 / 255, 0, 0])


class TestMasks:
    def one(self, root, mask, name="a.png", image_size=(48, 64), labels=None, **how):
        """A dataset of ten images, all with this mask: as a folder of the label, or by labels.json."""
        for number in range(10):
            save(root / f"images/{number}.png", np.full(image_size, number, np.uint8))
            place = "masks" if labels else "masks/thing"
            save(root / place / f"{number}{name[1:]}", mask, **how)
        if labels:
            say(root, labels)
        return open_own(root)[0].masks

    def test_jpeg_masks_are_cut_at_half(self, tmp_path):
        shape = disk(96, 128, 30, 50, 18)
        masks = self.one(tmp_path, np.dstack([shape * np.uint8(255)] * 3), "a.jpg", (96, 128), quality=75)
        assert masks.sum() == 1009 or abs(int(masks.sum()) - int(shape.sum())) <= 2

    def test_jpeg_masks_by_value_are_cut_at_half_and_label_maps_are_refused(self, tmp_path):
        shape = disk()
        masks = self.one(tmp_path / "a", shape * np.uint8(255), "a.jpg", labels={"thing": 255}, quality=75)
        assert abs(int(masks.sum()) - int(shape.sum())) <= 2
        two = shape * np.uint8(255) + disk(row=38, column=50, radius=6) * np.uint8(128)
        with pytest.raises(UserError, match=r"between the labels .*saved in a lossy format"):
            self.one(tmp_path / "b", two, "a.jpg", labels={"one": 255, "two": 128}, quality=75)
        with pytest.raises(UserError, match=r"0 to \d+ in a lossy format"):
            self.one(tmp_path / "c", shape * np.uint8(9), "a.jpg", quality=50)

    def test_soft_edges_are_cut_at_half(self, tmp_path):
        shape = disk(radius=12)
        soft = Image.fromarray(shape * np.uint8(255)).resize((32, 24), Image.BILINEAR).resize((64, 48), Image.BILINEAR)
        masks = self.one(tmp_path, soft)
        assert masks.sum() == (np.asarray(soft) > 127).sum() and abs(masks.sum() / shape.sum() - 1) < 0.04

    @pytest.mark.parametrize("radius, white, blur", [(10, 200, 1.0), (18, 250, 2.0), (6, 254, 1.5), (4, 180, 0.8)])
    def test_blurred_masks_are_cut_at_half_whatever_their_white(self, tmp_path, radius, white, blur):
        soft = gaussian_filter(disk(radius=radius).astype(float), blur) * white
        soft = soft.round().astype(np.uint8)
        np.testing.assert_array_equal(self.one(tmp_path, soft)[0], soft > soft.max() / 2)

    @pytest.mark.parametrize("size", [2, 3, 10], ids=lambda size: f"{size} pixels wide")
    @pytest.mark.parametrize("how", [{}, {"labels": {"cell": 255}}], ids=["by folder", "by labels.json"])
    def test_numbers_of_things_beside_white_are_an_error(self, tmp_path, size, how):
        things = np.zeros((90, 90), np.uint8)
        things[60:80, 60:80] = 255
        for number in range(1, 6):
            things[2:][:size, 17 * number - 15 :][:, :size] = number
        with pytest.raises(UserError, match=r"0\.png holds 1, 2, 3, 4, 5.* labels\.json"):
            self.one(tmp_path, things, image_size=(90, 90), **how)

    def test_the_white_border_that_voc_draws_is_an_error_in_a_mask_of_one_label(self, tmp_path):
        mask = disk().astype(np.uint8)
        mask[binary_dilation(disk()) & ~disk()] = 255
        with pytest.raises(UserError, match=r"holds 1 beside 255, and not as soft edges"):
            self.one(tmp_path, mask)

    @pytest.mark.parametrize("name, top", [("a.png", 256), ("a.png", 214), ("a.jpg", 256)])
    def test_a_picture_in_place_of_a_mask_is_an_error(self, tmp_path, name, top):
        grey = np.random.default_rng(0).integers(0, top, (48, 64)).astype(np.uint8)
        with pytest.raises(UserError, match=r"most of them between black and white: an image, and no mask"):
            self.one(tmp_path, grey, name)

    def test_whole_numbers_that_a_slope_has_made_are_labels(self, tmp_path):
        for case in range(10):
            save_nifti(tmp_path / f"images/{case}.nii.gz", np.zeros((12, 8, 2), np.int16))
            save_nifti(tmp_path / f"masks/{case}.nii.gz", np.full((12, 8, 2), 2 * 0.9999999, np.float32))
        say(tmp_path, {"a": 1, "b": 2})
        assert open_own(tmp_path)[0].masks.mean((1, 2)).tolist() == [0, 1]

    @pytest.mark.parametrize("quality", [10, 50, 75, 95, 100])
    @pytest.mark.parametrize("shape", [disk(), disk(radius=3), np.pad(np.ones((21, 31), bool), ((3, 24), (5, 28)))])
    def test_jpeg_masks_that_were_saved_again_as_png_are_cut_at_half(self, tmp_path, quality, shape):
        save(tmp_path / "once.jpg", shape * np.uint8(255), quality=quality)
        grey = np.asarray(Image.open(tmp_path / "once.jpg"))
        np.testing.assert_array_equal(self.one(tmp_path, grey)[0], grey > 127)

    @pytest.mark.parametrize("white", [1, 2, 128, 255])
    def test_two_values_are_a_label_whatever_they_are(self, tmp_path, white):
        np.testing.assert_array_equal(self.one(tmp_path, disk() * np.uint8(white))[0], disk())

    @pytest.mark.parametrize("white", [1, 300, 65535])
    def test_sixteen_bits_will_do(self, tmp_path, white):
        np.testing.assert_array_equal(self.one(tmp_path, (disk() * white).astype(np.uint16))[0], disk())

    def test_numbers_of_things_are_all_of_them_the_label(self, tmp_path):
        things = np.zeros((48, 64), np.uint16)
        for number in range(30):
            things[3 * (number // 6) :, 10 * (number % 6) :][:2, :8] = number + 1
        assert self.one(tmp_path / "few", things).sum() == (things > 0).sum()
        assert self.one(tmp_path / "up to 210", 7 * things).sum() == (things > 0).sum()

    @pytest.mark.parametrize("colour", [255, 0])
    def test_the_alpha_channel_holds_the_shape_where_colours_do_not(self, tmp_path, colour):
        pixels = np.full((48, 64, 4), colour, np.uint8)
        pixels[..., 3] = disk() * 255
        np.testing.assert_array_equal(self.one(tmp_path, pixels)[0], disk())

    def test_an_alpha_channel_that_is_full_says_nothing(self, tmp_path):
        pixels = np.dstack([disk() * np.uint8(255)] * 3 + [np.full((48, 64), 255, np.uint8)])
        np.testing.assert_array_equal(self.one(tmp_path, pixels)[0], disk())

    def test_a_palette_that_begins_with_white_is_seen_as_white(self, tmp_path):
        image = Image.fromarray(np.where(disk(), 0, 1).astype(np.uint8), "P")
        image.putpalette([255, 255, 255, 0, 0, 0])
        np.testing.assert_array_equal(self.one(tmp_path / "a", image)[0], disk())
        np.testing.assert_array_equal(self.one(tmp_path / "b", image, labels={"thing": 255})[0], disk())
        with pytest.raises(UserError, match="holds 255, which belong to no label"):
            self.one(tmp_path / "c", image, labels={"thing": 1})

    def test_numbers_in_a_palette_are_labels(self, tmp_path):
        image = Image.fromarray(disk().astype(np.uint8) * 2, "P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        masks = self.one(tmp_path, image, labels={"a": 1, "b": 2})
        assert masks.sum((1, 2)).tolist() == [0, disk().sum()]

    @pytest.mark.parametrize("value", [1, 255])
    def test_one_bit_is_one_or_white(self, tmp_path, value):
        masks = self.one(tmp_path, Image.fromarray(disk()), labels={"thing": value})
        np.testing.assert_array_equal(masks[0], disk())

    def test_white_is_zero_is_seen_as_white(self, tmp_path):
        for number in range(10):
            save(tmp_path / f"images/{number}.png", np.zeros((48, 64), np.uint8))
            (tmp_path / "masks/thing").mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(
                tmp_path / f"masks/thing/{number}.tif", (~disk() * np.uint8(255)), photometric="miniswhite"
            )
        np.testing.assert_array_equal(open_own(tmp_path)[0].masks[0], disk())

    def test_labels_may_be_colours(self, tmp_path):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[disk()] = (250, 50, 83)
        pixels[40:44] = (0, 128, 0)
        labels = {"cyst": "#fa3253", "vessel": [0, 128, 0], "background": "black"}
        masks = self.one(tmp_path / "a", pixels, labels=labels)
        np.testing.assert_array_equal(masks[0], disk())
        assert masks[1].sum() == 4 * 64
        pixels[0, 0] = (1, 2, 3)
        with pytest.raises(UserError, match=r"0\.png holds #010203, which belong to no label; known are #fa3253"):
            self.one(tmp_path / "b", pixels, labels=labels)

    def test_a_colour_that_masks_do_not_have_is_an_error(self, tmp_path):
        for index in range(10):
            save(tmp_path / f"images/{index}.png", np.zeros((48, 64), np.uint8))
            save(tmp_path / f"masks/{index}.png", disk().astype(np.uint8))
        say(tmp_path, {"cyst": "#fa3253"})
        with pytest.raises(UserError, match=r"\.png holds nothing brighter than #010101, which is not a soft edge"):
            samples_of(open_own(tmp_path))

    def test_an_unknown_colour_beside_one_label_is_an_error(self, tmp_path):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[disk()] = (250, 50, 83)
        np.testing.assert_array_equal(self.one(tmp_path / "a", pixels, labels={"cyst": "#fa3253"})[0], disk())
        pixels[40:44] = (0, 128, 0)
        with pytest.raises(UserError, match="holds #008000, which belongs to no label"):
            self.one(tmp_path / "b", pixels, labels={"cyst": "#fa3253"})

    def test_label_maps_that_were_interpolated_are_noticed(self, tmp_path):
        soft = np.zeros((24, 32, 2), np.float32)
        soft[4:9, 4:9] = 1.5
        for patient in range(10):
            save_nifti(tmp_path / f"images/{patient}.nii.gz", np.zeros((24, 32, 2), np.int16))
            save_nifti(tmp_path / f"masks/{patient}.nii.gz", soft)
        say(tmp_path, {"a": 1, "b": 2})
        with pytest.raises(UserError, match=r"0\.nii\.gz holds 1\.5, between the labels \[0, 1, 2\]: it was interpol"):
            open_own(tmp_path)[0]
        ring = np.asarray(Image.fromarray(disk() * np.uint8(2)).resize((128, 96), Image.BILINEAR))
        with pytest.warns(UserWarning, match="1 occurs only at the edges of higher values"):
            self.one(tmp_path / "b", ring, image_size=(96, 128), labels={"a": 1, "b": 2})

    def test_labels_json_may_have_a_mark_a_background_and_names_of_a_mac(self, tmp_path):
        for encoding in ("utf-8-sig", "utf-16"):
            root = tmp_path / encoding
            self.one(root, disk().astype(np.uint8))
            for path in sorted((root / "masks/thing").iterdir()):
                path.rename(root / "masks" / path.name)
            (root / "masks/thing").rmdir()
            say(root, {"background": 0, unicodedata.normalize("NFD", "Läsion"): 1}, encoding=encoding)
            dataset = open_own(root)
            assert list(dataset.labels) == ["Läsion"] and dataset[0].masks.sum() == disk().sum()
        say(tmp_path / "utf-16", {"1": "lesion", "0": "background"})
        assert list(open_own(tmp_path / "utf-16").labels) == ["lesion"]
        (tmp_path / "utf-16/labels.json").write_text('{"a": 1, "a": 2}')
        with pytest.raises(UserError, match="gives 'a' twice"):
            open_own(tmp_path / "utf-16")

    @pytest.mark.parametrize(
        "content, said",
        [
            ({"liver": 1, "tumor": 1.5}, "gives 'tumor' the value 1.5"),
            ({"liver": 1, "tumor": 1}, "gives 'liver' and 'tumor' one value, 1"),
            ({"liver": "#ff0000", "tumor": 2}, "gives 'liver' a colour and 'tumor' a number"),
            ({"liver": 1, "background": 5}, "gives the background the value 5"),
            ({"liver": "#000000"}, "gives 'liver' the colour black"),
            ({"background": 0}, "gives no label but the background"),
            (["liver"], r"holds \['liver'\]"),
        ],
    )
    def test_the_bad_entry_of_labels_json_is_quoted(self, tmp_path, content, said):
        save(tmp_path / "images/a.png", np.zeros((8, 8), np.uint8))
        save(tmp_path / "masks/a.png", np.zeros((8, 8), np.uint8))
        say(tmp_path, content)
        with pytest.raises(UserError, match=rf"labels\.json {said}.* it must give each label a whole number"):
            open_own(tmp_path)

    def test_names_written_in_two_ways_are_one(self, tmp_path):
        for number in range(10):
            save(tmp_path / "images" / unicodedata.normalize("NFC", f"Müller{number}.png"), np.zeros((8, 8), np.uint8))
            save(tmp_path / "masks" / unicodedata.normalize("NFD", f"Müller{number}.png"), np.ones((8, 8), np.uint8))
        say(tmp_path, {"thing": 1})
        assert open_own(tmp_path)[0].masks.all()


class TestPictures:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_turns_a_picture_upright(self, tmp_path, orientation):
        upright = np.where(disk()[..., None], 40, 200).repeat(3, 2).astype(np.uint8)
        back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each
        stored = Image.fromarray(upright)
        if orientation > 1:
            stored = stored.transpose(Image.Transpose(back[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
        grey = _read(tmp_path / "a.jpg", None)
        assert grey.shape == (48, 64) and grey[disk()].mean() < 0.25 < 0.7 < grey[~disk()].mean()

    def test_all_pages_of_a_stack_are_slices(self, tmp_path):
        for number in range(10):
            stack = np.random.default_rng(number).integers(0, 60, (5, 24, 32)).astype(np.uint8)
            mask = np.zeros(stack.shape, np.uint8)
            mask[2:5, 4:9, 5:12] = 1
            stack[mask > 0] += 150
            for kind, values in {"images": stack, "masks": mask}.items():
                (tmp_path / kind).mkdir(exist_ok=True)
                tifffile.imwrite(tmp_path / kind / f"s{number}.tif", values, compression="lzw")
        say(tmp_path, {"cell": 1})
        samples = [
            sample for split in ("train", "validation", "test") for sample in samples_of(open_own(tmp_path, split))
        ]
        present = [sample for sample in samples if sample.masks.any()]
        assert len(samples) == 50 and len(present) == 30 and min(map(contrast, present)) > 0.5
        assert {sample.group for sample in samples[:5]} == {"s0"} and samples[0].name == "s0_000"
        tifffile.imwrite(tmp_path / "masks/s0.tif", np.zeros((4, 24, 32), np.uint8), photometric="minisblack")
        with pytest.raises(UserError, match=r"s0\.tif is 4 pages of 32x24 pixels, its image 5 pages of 32x24"):
            open_own(tmp_path)[0]

    def test_pages_written_one_by_one_are_a_stack_unless_their_sizes_differ(self, tmp_path):
        for sizes in ((8, 8, 8), (8, 8, 9)):
            with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
                for value, size in enumerate(sizes):
                    writer.write(np.full((size, 9), value, np.uint8), photometric="minisblack")
            if len(set(sizes)) == 1:
                assert decode(tmp_path / "a.tif").values[:, 0, 0].tolist() == [0, 1, 2]
        with pytest.raises(UserError, match="holds pictures of different sizes, 8 x 9, 8 x 9, 9 x 9"):
            decode(tmp_path / "a.tif")

    def test_axes_of_tiff_are_told_apart(self, tmp_path):
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(path, np.zeros((4, 8, 9), np.uint16), metadata={"axes": "ZYX"})
        assert decode(path).values.shape == (4, 8, 9)
        tifffile.imwrite(path, np.zeros((1, 1, 8, 9), np.uint16), metadata={"axes": "TCYX"})
        assert decode(path).values.shape == (1, 8, 9)
        tifffile.imwrite(path, np.full((3, 8, 9), 7, np.uint16), metadata={"axes": "CYX"})
        assert decode(path).values.shape == (1, 8, 9, 3)
        for axes, shape in (("CYX", (2, 8, 9)), ("TZYX", (2, 3, 8, 9))):
            tifffile.imwrite(path, np.zeros(shape, np.uint16), metadata={"axes": axes})
            with pytest.raises(UserError, match="several channels or time points"):
                decode(path)

    def test_other_kinds_of_pictures(self, tmp_path):
        colours = np.zeros((8, 9, 3), np.uint8)
        colours[:, :4] = (200, 30, 60)
        for name in ("a.webp", "a.gif", "a.jp2"):
            save(tmp_path / name, colours, **({"lossless": True} if name == "a.webp" else {}))
            np.testing.assert_array_equal(decode(tmp_path / name).values[0], colours)
        save(tmp_path / "cmyk.jpg", Image.fromarray(colours).convert("CMYK"), quality=95)
        save(tmp_path / "cmyk.tif", Image.fromarray(colours).convert("CMYK"))
        np.testing.assert_array_equal(decode(tmp_path / "cmyk.tif").values[0], colours)
        assert np.abs(decode(tmp_path / "cmyk.jpg").values[0].astype(int) - colours)[2:6, :2].max() < 12
        tifffile.imwrite(tmp_path / "deep.tif", colours.astype(np.uint16) * 257, photometric="rgb")
        grey = _read(tmp_path / "deep.tif", None)
        assert grey[:, :4].min() == 1 and grey[:, 4:].max() == 0

    def test_a_large_stack_without_compression_stays_on_the_disk(self, tmp_path, monkeypatch):
        stack = np.arange(5 * 48 * 64, dtype=np.uint16).reshape(5, 48, 64)
        for compression in (None, "zlib"):
            path = tmp_path / f"{compression}.ome.tif"
            tifffile.imwrite(path, stack, metadata={"axes": "ZYX"}, compression=compression)
            monkeypatch.setattr("sam_medical.data.decoding.MAPPED_FROM", 1000)
            values = decode(path).values
            assert isinstance(values, np.memmap) == (compression is None)
            np.testing.assert_array_equal(values, stack)
            assert source_of_file(path).name == str(compression)
        monkeypatch.setattr("sam_medical.data.decoding.MOST_BYTES", 1000)
        with pytest.raises(UserError, match=r"zlib\.ome\.tif holds 0\.0 GB, more than .*; cut it into smaller stacks"):
            decode(path)

    def test_what_is_too_large_is_refused_before_it_is_read(self, tmp_path):
        Image.new("1", (14000, 14000)).save(tmp_path / "slide.png")
        with pytest.raises(UserError, match=r"slide\.png is 14000 x 14000 pixels, more than 100,000,000; cut it"):
            decode(tmp_path / "slide.png")


class TestLayouts:
    def test_nnunet(self, tmp_path):
        for case in range(10):
            scan, mask = np.zeros((12, 8, 2), np.float32), np.zeros((12, 8, 2), np.uint8)
            mask[3:6, 2:5], mask[3, 2] = 1, 2
            save_nifti(tmp_path / f"imagesTr/case_{case:03}_0000.nii.gz", scan + mask)
            save_nifti(tmp_path / f"labelsTr/case_{case:03}.nii.gz", mask)
        content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2], "core": 2}}
        say(tmp_path, content, "dataset.json")
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["whole", "core"] and dataset.reading.modality == "CT" and len(dataset) == 14
        assert dataset[0].masks.sum((1, 2)).tolist() == [9, 1]
        save_nifti(tmp_path / "imagesTr/case_000_0001.nii.gz", np.zeros((12, 8, 2), np.float32))
        with pytest.raises(UserError, match=r"case_000_0000\.nii\.gz has 2 channels"):
            open_own(tmp_path)

    def test_nnunet_has_colours_as_channels_of_one_file(self, tmp_path):
        for case in range(10):
            colours = np.zeros((48, 64, 3), np.uint8)
            colours[disk()] = (200, 30, 40)
            save(tmp_path / f"imagesTr/c_{case:03}_0000.png", colours)
            save(tmp_path / f"labelsTr/c_{case:03}.png", disk().astype(np.uint8))
        channels = {"0": "R", "1": "G", "2": "B"}
        say(tmp_path, {"channel_names": channels, "labels": {"background": 0, "polyp": 1}}, "dataset.json")
        sample = open_own(tmp_path)[0]
        np.testing.assert_allclose(sample.image[sample.masks[0]].mean(0) * 255, (200, 30, 40), rtol=1e-5)

    def test_the_decathlon(self, tmp_path):
        for case in range(10):
            save_nifti(tmp_path / f"imagesTr/liver_{case}.nii.gz", np.zeros((12, 8, 2), np.int16))
            save_nifti(tmp_path / f"labelsTr/liver_{case}.nii.gz", np.ones((12, 8, 2), np.uint8))
            (tmp_path / f"imagesTr/._liver_{case}.nii.gz").write_bytes(b"\0\5\x16\7")
        content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "liver"}, "tensorImageSize": "3D"}
        say(tmp_path, content, "dataset.json")
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["liver"] and dataset[0].masks.all() and dataset.reading.modality == "MRI"

    def coco(self, root, annotation, **more):
        for index in range(10):
            save(root / f"images/{index:03}.jpg", np.zeros((48, 64), np.uint8))
        images = [{"id": 40 + i, "file_name": f"{i:03}.jpg", "width": 64, "height": 48, **more} for i in range(10)]
        annotations = [{"id": i, "image_id": 40 + i, "category_id": 7, **annotation} for i in range(10) if i != 3]
        categories = [{"id": 7, "name": "cyst"}, {"id": 9, "name": "never"}]
        say(root / "annotations", {"images": images, "annotations": annotations, "categories": categories}, "i.json")

    def test_coco_polygons_and_runs(self, tmp_path):
        shape = np.zeros((48, 64), bool)
        shape[10:31, 14:35] = True
        self.coco(tmp_path / "a", {"segmentation": [[14, 10, 35, 10, 35, 31, 14, 31]]})
        dataset = open_own(tmp_path / "a")
        assert list(dataset.labels) == ["cyst"] and not open_own(tmp_path / "a", "validation")[0].masks.any()
        np.testing.assert_array_equal(dataset[0].masks[0], shape)
        changes = np.flatnonzero(np.diff(shape.T.ravel().astype(int), prepend=0))
        counts = np.diff([0, *changes, shape.size]).tolist()
        self.coco(tmp_path / "b", {"segmentation": {"counts": counts, "size": [48, 64]}, "iscrowd": 1})
        np.testing.assert_array_equal(open_own(tmp_path / "b")[0].masks[0], shape)
        self.coco(tmp_path / "c", {"segmentation": [], "bbox": [14, 10, 21, 21]})
        with pytest.raises(UserError, match="gives annotation 0 a box but no outline"):
            open_own(tmp_path / "c")

    @pytest.mark.parametrize("image_id", [999, "44"])
    def test_a_coco_annotation_of_no_image_is_an_error(self, tmp_path, image_id):
        self.coco(tmp_path, {"segmentation": [[14, 10, 35, 10, 35, 31, 14, 31]]})
        path = tmp_path / "annotations" / "i.json"
        content = json.loads(path.read_text())
        content["annotations"][4]["image_id"] = image_id
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"i\.json has 1 annotations of an image with the id {image_id!r}"):
            open_own(tmp_path)

    def test_what_is_wrong_with_coco_is_said(self, tmp_path):
        self.coco(tmp_path / "a", {"segmentation": {"counts": [0, 600], "size": [20, 30]}, "iscrowd": 1})
        with pytest.raises(UserError, match=r"run lengths of 20 x 30 in annotation 0, and 000\.jpg is 48 x 64"):
            open_own(tmp_path / "a")[0]
        self.coco(tmp_path / "b", {"segmentation": [[14, 10, 35, 10, 35, 31]], "category_id": 3})
        with pytest.raises(UserError, match=r"gives its 9 annotations the categories 3, but lists 7, 9; add them"):
            open_own(tmp_path / "b")

    @pytest.mark.parametrize("image_of", ["images/{}/a{}.jpg", "images/{}2017/a{}.jpg", "{}/a{}.jpg"])
    def test_coco_files_of_splits(self, tmp_path, image_of):
        for split in ("train", "val", "test"):
            for index in range(2):
                save(tmp_path / image_of.format(split, index), np.full((48, 64), 40 * len(split), np.uint8))
            images = [{"id": i, "file_name": f"a{i}.jpg", "width": 64, "height": 48} for i in range(2)]
            outline = {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
            content = {"images": images, "annotations": [outline], "categories": [{"id": 1, "name": "cyst"}]}
            say(tmp_path / "annotations", content, f"instances_{split}2017.json")
        for split, length in {"train": 5, "validation": 3, "test": 4}.items():
            dataset = open_own(tmp_path, split)
            assert len(dataset) == 2 and dataset[0].masks.sum() == 81
            assert dataset[0].image.mean() == pytest.approx(40 * length / 255, abs=0.01)
        (tmp_path / "annotations/instances_test2017.json").unlink()
        with pytest.raises(UserError, match="COCO's files for its splits, but none for test"):
            open_own(tmp_path, "test")

    @pytest.mark.parametrize("places", [("", ""), ("images/", "annotations/")])
    def test_labelme(self, tmp_path, places):
        for index in range(10):
            save(tmp_path / f"{places[0]}{index}.png", np.zeros((48, 64), np.uint8))
            shapes = [
                {"label": "cyst", "shape_type": "polygon", "points": [[14, 10], [34, 10], [34, 30], [14, 30]]},
                {"label": "stone", "shape_type": "circle", "points": [[50, 20], [50, 25]]},
            ]
            content = {
                "imagePath": f"{index}.png",
                "imageWidth": 64,
                "imageHeight": 48,
                "shapes": shapes[: 1 + index % 2],
            }
            say(tmp_path / places[1], content, f"{index}.json")
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["cyst", "stone"] and dataset[1].masks[0].sum() == 21 * 21
        assert dataset[0].masks[1].sum() == 0 and dataset[1].masks[1].sum() == pytest.approx(np.pi * 5.5**2, rel=0.1)

    def test_masks_with_a_suffix_are_matched_and_united(self, tmp_path):
        one, two = disk(), disk(column=50, radius=6)
        for index in range(10):
            save(tmp_path / f"images/benign ({index}).png", (one | two) * np.uint8(150))
            save(tmp_path / f"masks/benign ({index})_mask.png", one * np.uint8(255))
            save(tmp_path / f"masks/benign ({index})_mask_1.png", two * np.uint8(255))
        say(tmp_path, {"lesion": 255})
        dataset = open_own(tmp_path)
        np.testing.assert_array_equal(dataset[0].masks[0], one | two)
        assert "benign (0)_mask.png with benign (0).png" in dataset.notes[0]

    @pytest.mark.parametrize(
        "image, mask",
        [
            ("img/img{:04}", "label/label{:04}"),
            ("volume-{}", "segmentation-{}"),
            ("case_{:05}/imaging", "case_{:05}/segmentation"),
        ],
        ids=["BTCV", "LiTS", "KiTS"],
    )
    def test_numbers_behind_other_words_are_matched(self, tmp_path, image, mask):
        for case in range(12):
            scan, place = np.zeros((12, 8, 2), np.int16), np.zeros((12, 8, 2), np.uint8)
            place[case] = 1
            save_nifti(tmp_path / f"{image.format(case)}.nii.gz", scan + 900 * place.astype(np.int16))
            save_nifti(tmp_path / f"{mask.format(case)}.nii.gz", place)
        say(tmp_path, {"liver": 1})
        samples = samples_of(open_own(tmp_path))
        assert len(samples) == 18 and min(map(contrast, samples)) > 0.9

    def test_a_link_that_leads_back_is_not_followed(self, tmp_path):
        for index in range(10):
            for kind in ("images", "masks"):
                save(tmp_path / f"{kind}/{index}.png", np.ones((8, 9), np.uint8))
        (tmp_path / "images/again").symlink_to(tmp_path / "images")
        say(tmp_path, {"thing": 1})
        assert len(open_own(tmp_path)) == 7

    def test_masks_beside_their_images(self, tmp_path):
        for index in range(10):
            kind = ("benign", "malignant")[index % 2]
            save(tmp_path / f"{kind}/{kind} ({index}).png", np.zeros((48, 64), np.uint8))
            save(tmp_path / f"{kind}/{kind} ({index})_mask.png", disk() * np.uint8(255))
        dataset = open_own(tmp_path)
        assert (len(dataset), list(dataset.labels)) == (7, ["lesion"])
        np.testing.assert_array_equal(dataset[0].masks[0], disk())

    @pytest.mark.parametrize("inner", ["images/scan.png", "images/s{}.png", "ct.png"])
    def test_a_folder_a_patient(self, tmp_path, inner):
        for patient in range(10):
            name = inner.format(patient)
            save(tmp_path / f"p{patient}/{name}", np.full((48, 64), 9 * patient, np.uint8))
            save(tmp_path / f"p{patient}/masks/{Path(name).name}", disk().astype(np.uint8) * 3)
        say(tmp_path, {"cyst": 3})
        (sample,) = samples_of(open_own(tmp_path, "validation"))
        assert sample.group == "p3" and sample.image.mean() == pytest.approx(27 / 255) and sample.masks[0].sum() == 305

    def test_patients_of_several_images_and_folders_of_labels(self, tmp_path):
        for patient in range(10):
            for number in range(3):
                save(tmp_path / f"train/p{patient}/images/s{number}.png", np.full((48, 64), 9 * number, np.uint8))
                label = ("cyst", "stone")[number % 2]
                save(tmp_path / f"train/p{patient}/masks/{label}/s{number}.png", disk(row=20 + number) * np.uint8(255))
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["cyst", "stone"] and len(dataset) == 30
        assert dataset[1].masks.sum((1, 2)).tolist() == [0, 305] and dataset[1].masks[1, 12].any()
        (tmp_path / "train/p4/masks/cyst/s2.png").unlink()
        with pytest.raises(UserError, match=r"p4/images/s2\.png has no mask in .*p4; add it"):
            open_own(tmp_path)

    def test_the_data_science_bowl_has_a_mask_of_each_thing(self, tmp_path):
        for index in range(10):
            save(tmp_path / f"id{index}/images/id{index}.png", np.zeros((48, 64), np.uint8))
            for number, column in enumerate((15, 45)):
                save(tmp_path / f"id{index}/masks/{index}a{number}.png", disk(column=column) * np.uint8(255))
        dataset = open_own(tmp_path)
        assert dataset[0].masks.sum((1, 2)).tolist() == [610] and 'the label is called "lesion"' in dataset.notes[-1]

    def test_totalsegmentator_has_a_file_a_label(self, tmp_path):
        scan = np.zeros((12, 8, 2), np.int16)
        for case in range(10):
            save_nifti(tmp_path / f"s{case:04}/ct.nii.gz", scan)
            for number, label in enumerate(("liver", "spleen")):
                mask = scan.astype(np.uint8)
                mask[2 * number : 2 * number + 2] = 1
                save_nifti(tmp_path / f"s{case:04}/segmentations/{label}.nii.gz", mask)
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["liver", "spleen"] and len(dataset) == 14
        assert [np.argwhere(mask.any(0)).ravel().tolist() for mask in dataset[0].masks] == [[0, 1], [2, 3]]

    @pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage])
    def test_headers_and_pixels_in_two_files(self, tmp_path, kind):
        for case in range(10):
            for place in ("images", "masks"):
                (tmp_path / place).mkdir(exist_ok=True)
                values = np.zeros((12, 8, 2), np.int16)
                values[3:6, 2:5] = 1
                nib.save(kind(values, np.diag([-2.0, 2, 2, 1])), tmp_path / f"{place}/c{case}.img")
        say(tmp_path, {"lesion": 1})
        dataset = open_own(tmp_path)
        assert dataset.notes == [] and len(dataset) == 14 and contrast(dataset[0]) == 1

    def test_what_systems_leave_behind_is_no_label_and_unknown_files_are_named(self, tmp_path):
        for index in range(10):
            save(tmp_path / f"images/{index}.png", np.zeros((48, 64), np.uint8))
            save(tmp_path / f"masks/cyst/{index}.png", disk() * np.uint8(255))
        for junk in ("masks/__MACOSX/cyst/._0.png", "masks/cyst/Thumbs.db", "images/.DS_Store", "images/._0.png"):
            (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / junk).write_bytes(b"\0\5\x16\7")
        dataset = open_own(tmp_path)
        assert list(dataset.labels) == ["cyst"] and dataset.notes == []
        (tmp_path / "images/scan.heic").write_bytes(b"no")
        assert "scan.heic" in open_own(tmp_path).notes[0]

    def test_folders_in_folders_are_split_by_folder(self, tmp_path):
        for patient in range(10):
            for number in range(3):
                for kind in ("images", "masks"):
                    save(tmp_path / f"{kind}/p{patient}/s{number}.png", np.ones((8, 9), np.uint8))
        say(tmp_path, {"thing": 1})
        test = samples_of(open_own(tmp_path, "test"))
        assert [sample.name for sample in test] == [f"p{p}_s{s}" for p in (7, 9) for s in range(3)]
        assert {sample.group for sample in test} == {"p7", "p9"}


class TestDicom:
    def write(self, folder, scan, slope=1.0, modality="CT", names=None, uid=1, **tags):
        folder.mkdir(parents=True, exist_ok=True)
        for number, plane in enumerate(scan):
            image = sitk.GetImageFromArray(np.round(plane).astype(np.int16))
            image.SetSpacing((0.8, 0.8))
            known = {
                "0008|0060": modality,
                "0020|000d": f"1.2.826.0.1.3680043.2.1124.{uid}",
                "0020|000e": f"1.2.826.0.1.3680043.2.1125.{uid}",
                "0020|0032": f"-10\\-12\\{5.0 * number}",
                "0020|0037": "1\\0\\0\\0\\1\\0",
                "0020|0013": str(number + 1),
                "0028|1053": str(slope),
                "0028|1052": "0",
            }
            for tag, value in {**known, **tags}.items():
                image.SetMetaData(tag, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            path = folder / f"IM{(7 * number) % 11:04}.dcm"
            writer.SetFileName(str(path))
            writer.Execute(image)
            if names:
                path.rename(folder / names[number])

    def dataset(self, root, **how):
        random = np.random.default_rng(0)
        for patient in range(10):
            scan, mask = random.normal(60, 5, (6, 16, 20)), np.zeros((6, 16, 20), np.uint8)
            mask[2:5, 4:9, 10:15] = 1
            scan[mask > 0] -= 40
            self.write(root / f"images/p{patient}", scan, uid=patient + 1, **how)
            affine = np.diag([-0.8, -0.8, 5.0, 1])
            affine[:3, 3] = (10, 12, 0)
            save_nifti(root / f"masks/p{patient}.nii.gz", mask.transpose(2, 1, 0), affine)
        say(root, {"lesion": 1})
        return open_own(root)

    def test_a_folder_is_a_volume_in_the_order_of_places(self, tmp_path):
        dataset = self.dataset(tmp_path)
        present = [sample for sample in samples_of(dataset) if sample.masks.any()]
        assert len(dataset) == 7 * 6 and len(present) == 7 * 3 and settle_reading(dataset).intensity == "auto:ct"
        assert np.mean([contrast(sample) for sample in present]) == pytest.approx(-0.1, abs=0.01)

    def test_files_need_no_ending(self, tmp_path):
        assert len(self.dataset(tmp_path, names=[f"IM{number}" for number in (3, 1, 5, 0, 2, 4)])) == 42

    def change(self, path, **tags):
        dataset = pydicom.dcmread(path)
        for name, value in tags.items():
            setattr(dataset, name, value)
        dataset.save_as(path)

    def test_slope_and_intercept_are_applied_slice_by_slice(self, tmp_path):
        self.write(tmp_path / "p", np.full((3, 8, 8), 100.0), modality="PT")
        for number, slope in enumerate((1, 2, 0.505)):
            path = tmp_path / "p" / f"IM{(7 * number) % 11:04}.dcm"
            self.change(path, RescaleSlope=slope, RescaleIntercept=-10)
        (source,), _ = find_sources(tmp_path)
        np.testing.assert_allclose(source.decode().values[0, 0], [90, 190, 40.5], rtol=1e-6)

    def test_a_missing_slice_and_one_that_is_there_twice_are_named(self, tmp_path):
        self.write(tmp_path / "a", np.zeros((6, 8, 8)))
        (tmp_path / "a" / "IM0010.dcm").unlink()  # the fourth, 7 * 3 % 11
        (source,), _ = find_sources(tmp_path)
        with pytest.raises(UserError, match=r"slices 5 mm apart, but IM0003\.dcm and IM0006\.dcm are 10 mm apart"):
            source.decode()
        self.write(tmp_path / "b", np.zeros((3, 8, 8)), **{"0020|0032": "0\\0\\0"})
        (_, source), _ = find_sources(tmp_path)
        with pytest.raises(UserError, match="has two slices at one position"):
            source.decode()

    def test_a_tilted_gantry_is_refused(self, tmp_path):
        for number in range(3):
            place = {"0020|0032": f"-10\\{1.5 * number}\\{5.0 * number}"}
            self.write(tmp_path / "p", np.zeros((1, 8, 8)), names=[f"{number}.dcm"], **place)
        (source,), _ = find_sources(tmp_path)
        with pytest.raises(UserError, match=r"p has slices that are not aligned .*tilted by 17 degrees.*dcm2niix"):
            source.decode()

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_frames_of_one_file_lie_where_they_say(self, tmp_path, order):
        scan = np.arange(3)[:, None, None] * 10 + np.zeros((3, 6, 8), int)
        scan[2, 1, 4] = -500
        write_enhanced_ct(tmp_path / "a.dcm", scan, order)
        found = decode(tmp_path / "a.dcm")
        assert found.values[0, 0].tolist() == [0, 10, 20] and np.argwhere(found.values == -500).tolist() == [[4, 1, 2]]
        np.testing.assert_allclose(found.affine[:3], [[-0.8, 0, 0, 10], [0, -0.9, 0, 12], [0, 0, 5, 0]])
        write_enhanced_ct(tmp_path / "b.dcm", scan, order, tilt=1.5)
        with pytest.raises(UserError, match="tilted by 17 degrees"):
            decode(tmp_path / "b.dcm")

    def test_two_series_in_a_folder_are_two_volumes(self, tmp_path):
        names = ([f"a{number}.dcm" for number in range(3)], [f"b{number}.dcm" for number in range(3)])
        for number, some in enumerate(names, start=1):
            tags = {"0020|0011": str(number)}
            self.write(tmp_path / "p", np.full((3, 8, 8), number), uid=number, names=some, **tags)
        sources, _ = find_sources(tmp_path)
        assert [source.name for source in sources] == ["p_series1", "p_series2"]
        assert [source.decode().values.max() for source in sources] == [1, 2]

    @pytest.mark.parametrize("slices", [1, 3])
    def test_localizers_beside_a_series_are_left_out_and_named(self, tmp_path, slices):
        self.dataset(tmp_path)
        across = {"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER", "0020|0037": "1\\0\\0\\0\\0\\-1"}
        for patient in range(10):
            names = [f"LOC{number}.dcm" for number in range(slices)]
            self.write(tmp_path / "apart", np.zeros((slices, 8, 8)), uid=100 + patient, names=names, **across)
            for path in (tmp_path / "apart").iterdir():
                path.rename(tmp_path / f"images/p{patient}/{path.name}")
        dataset = open_own(tmp_path)
        assert len(dataset) == 42 and f"{10 * slices} DICOM localizers are left out" in dataset.notes[0]

    def test_why_a_series_has_no_mask_is_said(self, tmp_path):
        self.dataset(tmp_path / "two")
        names = [f"B{number}.dcm" for number in range(3)]
        self.write(tmp_path / "apart", np.zeros((3, 8, 8)), uid=99, names=names, **{"0020|0011": "7"})
        for path in (tmp_path / "apart").iterdir():
            path.rename(tmp_path / f"two/images/p0/{path.name}")
        with pytest.raises(UserError, match=r"p0 holds 2 DICOM series .*7, 3 slices from B0\.dcm.*move the others"):
            open_own(tmp_path / "two")
        self.dataset(tmp_path / "nowhere")
        for path in (tmp_path / "nowhere/images/p0").iterdir():
            header = pydicom.dcmread(path)
            del header.ImagePositionPatient
            header.save_as(path)
        with pytest.raises(UserError, match=r"the 6 DICOM files of .*p0 have no position \(ImagePositionPatient\)"):
            open_own(tmp_path / "nowhere")

    def test_monochrome1_is_seen_as_viewers_show_it(self, tmp_path):
        scan = np.zeros((1, 8, 9))
        scan[0, 2, 3] = 100
        self.write(tmp_path, scan, modality="DX", names=["x.dcm"])
        self.change(tmp_path / "x.dcm", PhotometricInterpretation="MONOCHROME1")
        values = decode(tmp_path / "x.dcm").values
        assert values.shape == (1, 8, 9) and values[0, 0, 0] - values[0, 2, 3] == 100

    def test_files_that_pydicom_ships(self):
        for name, shape in {
            "CT_small.dcm": (1, 128, 128),
            "MR_small_RLE.dcm": (1, 64, 64),
            "JPEG2000.dcm": (1, 1024, 256),
            "examples_rgb_color.dcm": (1, 240, 320, 3),
        }.items():
            assert decode(SHIPPED / name).values.shape == shape
        for name, reason in {
            "rtplan.dcm": "holds no picture, it is DICOM of the modality RTPLAN",
            "test-SR.dcm": "of the modality SR",
            "liver_1frame.dcm": "is a DICOM SEG; save it as NIfTI",
            "SC_rgb_rle_16bit.dcm": "has a rare encoding that ITK misreads",
            "MR_truncated.dcm": r"cannot be read as DICOM \(ITK ERROR",
        }.items():
            with pytest.raises(UserError, match=reason):
                decode(SHIPPED / name)
