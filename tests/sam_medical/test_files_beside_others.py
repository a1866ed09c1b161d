"""Other files beside images and masks: further masks, DICOM without pixels, system files."""

import numpy as np
import pytest
import test_real_files
from test_real_files import SHIPPED, disk, open_own, save, save_nifti, say

from sam_medical.common.errors import UserError
from sam_medical.data.decoding import Scan, decode
from sam_medical.data.doubts import doubt_about
from sam_medical.data.opening import settle_reading
from sam_medical.data.reading import Reading
from sam_medical.data.sources import find_sources

dicom = test_real_files.TestDicom()
DISK = disk()


class TestLayouts:
    def test_drive_has_its_vessels_in_1st_manual_and_the_field_of_view_in_mask(self, tmp_path):
        for split in ("training", "val", "test"):
            for number in range(21, 24):
                save(tmp_path / f"{split}/images/{number}_{split}.tif", np.zeros((48, 64, 3), np.uint8))
                save(tmp_path / f"{split}/1st_manual/{number}_manual1.gif", DISK * np.uint8(255))
                save(tmp_path / f"{split}/mask/{number}_{split}_mask.gif", np.full((48, 64), 255, np.uint8))
        say(tmp_path, {"vessel": 255})
        dataset = open_own(tmp_path)
        assert [sample.masks.sum() for sample in dataset] == [DISK.sum()] * 3
        assert "masks are those of 1st_manual; left out is mask beside it" in dataset.notes

    def test_masks_may_lie_beside_their_pictures_in_images(self, tmp_path):
        for index in range(10):
            save(tmp_path / f"images/{index}.png", np.zeros((48, 64), np.uint8))
            save(tmp_path / f"images/{index}_mask.png", DISK * np.uint8(255))
        dataset = open_own(tmp_path)
        assert len(dataset) == 7 and dataset[0].masks.sum() == DISK.sum()

    def test_a_missing_mask_is_called_by_the_name_it_should_have(self, tmp_path):
        for index in range(2):
            save_nifti(tmp_path / f"B00{index}/B00{index}_flair.nii.gz", np.zeros((4, 4, 2)))
        save_nifti(tmp_path / "B001/B001_flair_mask.nii.gz", np.zeros((4, 4, 2)))
        with pytest.raises(UserError, match=r"B000_flair\.nii\.gz has no mask, B000_flair_mask beside it"):
            open_own(tmp_path)

    def test_what_systems_leave_behind_is_not_read_and_jfif_is(self, tmp_path):
        save(tmp_path / "a.jpg", DISK * np.uint8(255))
        (tmp_path / "a.jpg").rename(tmp_path / "a.jfif")
        for folder in ("#recycle", "@eaDir", ".ipynb_checkpoints"):
            save(tmp_path / folder / "b.png", DISK)
        for name in ("._a.png", ".DS_Store"):
            (tmp_path / name).write_bytes(b"x")
        sources, unknown = find_sources(tmp_path)
        assert ([source.name for source in sources], unknown) == (["a"], [])
        assert sources[0].decode().values.max() == 255


class TestDicomWithoutPictures:
    @pytest.mark.parametrize("inner", ["", "plan/"])
    def test_it_is_named_and_left_out(self, tmp_path, inner):
        dicom.dataset(tmp_path)
        for patient in range(10):
            path = tmp_path / f"images/p{patient}/{inner}RS.dcm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((SHIPPED / "rtstruct.dcm").read_bytes())
        dataset = open_own(tmp_path)
        assert len(dataset) == 42
        assert dataset.notes[0].startswith("10 DICOM files of RTSTRUCT, which holds no picture, are left out, first ")

    def test_a_damaged_file_is_still_an_error(self, tmp_path):
        dicom.write(tmp_path / "p", np.zeros((3, 8, 8)))
        (tmp_path / "p/x.dcm").write_bytes(b"nothing")
        sources, _ = find_sources(tmp_path)
        assert [source.left_out for source in sources] == ["", ""]
        with pytest.raises(UserError, match=r"x\.dcm"):
            next(source for source in sources if source.name.endswith("x")).decode()


class TestModality:
    def test_phases_of_mri_are_no_ct_and_padded_ct_is(self, tmp_path):
        random = np.random.default_rng(0)
        phases = random.uniform(-4096, 4094, (64, 64, 3))
        phases[10:50, 10:50] = random.normal(500, 150, (40, 40, 3))
        ct = random.normal(-1000, 20, (64, 64, 3))
        ct[10:50, 10:50] = random.normal(50, 20, (40, 40, 3))
        ct[:8] = -3024
        for name, values, chosen in (("phase", phases, "auto:percentile"), ("ct", ct, "auto:ct")):
            for index in range(10):
                save_nifti(tmp_path / name / f"images/{index}.nii.gz", values.astype(np.int16))
                save_nifti(tmp_path / name / f"masks/{index}.nii.gz", np.zeros(values.shape, np.uint8))
            say(tmp_path / name, {"lesion": 1})
            dataset = open_own(tmp_path / name)
            reading = settle_reading(dataset)
            doubt = doubt_about(dataset.scan(0), reading)
            assert reading.intensity == chosen and ("MRI phase images" in doubt) == (name == "phase")

    @pytest.mark.parametrize(("modality", "is_said"), [("", True), ("PT", False), ("MR", False)])
    def test_only_what_may_be_ct_is_said_to_be(self, tmp_path, modality, is_said):
        values = np.random.default_rng(0).normal(1060, 40, (32, 32, 3)).clip(0)
        values[:8] = 20
        scan = Scan(tmp_path, values.astype(np.int16), np.eye(4), True, modality)
        assert ("may be CT with 1024 added" in doubt_about(scan, Reading("auto:percentile", offset="none"))) == is_said


def test_lossy_masks_of_black_and_white_are_cut_at_half(tmp_path):
    """Such formats leave the channels of a grey apart."""
    tinted = np.dstack([DISK * np.uint8(255)] * 3).astype(int)
    tinted[..., 2] = abs(tinted[..., 2] - 9)
    for index in range(10):
        save(tmp_path / f"images/{index}.png", np.zeros((48, 64), np.uint8))
        save(tmp_path / f"masks/{index}.webp", tinted.astype(np.uint8), quality=40)
    values = decode(tmp_path / "masks/0.webp").values[0]
    assert (values != values[..., :1]).any()
    say(tmp_path, {"lesion": 255})
    assert abs(int(open_own(tmp_path)[0].masks.sum()) - int(DISK.sum())) <= 8
