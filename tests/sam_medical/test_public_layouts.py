"""Miniatures of the public datasets with their peculiarities, and the layouts of the user's own data.

The peculiarities are RGBA files, masks of 0 and 1, misleading columns, smooth edges, borders and overlapping findings.
"""

import itertools
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam_medical.common.errors import UserError
from sam_medical.data.abdominal_us import COLOURS
from sam_medical.data.opening import open_dataset, open_splits

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"


def names(dataset):
    return [dataset[index].name for index in range(len(dataset))]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


class TestCholecSeg8k:
    @pytest.fixture
    def folder(self, tmp_path):
        watershed = np.full((20, 30), 50, dtype=np.uint8)
        watershed[4:9, 5:10] = 21
        watershed[10:12, 20:28] = 32
        watershed[15, 15] = 0
        watershed[[0, -1]] = watershed[:, [0, -1]] = 255
        for video, frames in {"video01": 3, "video12": 2, "video17": 12, "video52": 9, "video99": 1}.items():
            for frame in range(frames):
                stem = tmp_path / video / f"{video}_00080" / f"frame_{80 + frame}_endo"
                save(stem.with_suffix(".png"), np.dstack([grey(seed=frame)] * 3))
                opaque = np.full_like(watershed, 255)
                save(stem.with_name(f"{stem.name}_watershed_mask.png"), np.dstack([watershed] * 3 + [opaque]))
                for kind in ("mask", "color_mask"):
                    save(stem.with_name(f"{stem.name}_{kind}.png"), watershed)
        return tmp_path

    def test_grey_values_are_labels_and_the_border_is_none(self, folder):
        dataset = open_dataset("cholecseg8k", str(folder), "train")
        sample = dataset[0]
        assert (len(dataset), len(dataset.labels), sample.name) == (3, 12, "video01_00080_frame_80_endo")
        areas = dict(zip(dataset.labels, sample.masks.sum((1, 2)), strict=True))
        assert {label: area for label, area in areas.items() if area} == {"liver": 25, "L-hook electrocautery": 16}

    def test_videos_are_split_as_in_the_paper_and_every_tenth_test_frame_is_taken(self, folder):
        assert len(open_dataset("cholecseg8k", str(folder), "validation")) == 2
        assert len(open_dataset("cholecseg8k", str(folder), "test-all")) == 21
        assert names(open_dataset("cholecseg8k", str(folder), "test")) == [
            "video17_00080_frame_80_endo",
            "video17_00080_frame_90_endo",
            "video52_00080_frame_88_endo",
        ]

    def test_bad_files_are_named(self, folder):
        clip = folder / "video12" / "video12_00080"
        save(clip / "frame_80_endo_watershed_mask.png", np.full((20, 30), 77, dtype=np.uint8))
        with pytest.raises(UserError, match=r"frame_80_endo_watershed_mask\.png holds 77, which belong to no label"):
            open_dataset("cholecseg8k", str(folder), "validation")[0]
        (clip / "frame_81_endo_watershed_mask.png").unlink()
        with pytest.raises(UserError, match=r"frame_81_endo\.png has no mask"):
            open_dataset("cholecseg8k", str(folder), "validation")
        shutil.rmtree(folder / "video01")
        with pytest.raises(UserError, match=r"no frames of the split train.*video01"):
            open_dataset("cholecseg8k", str(folder), "train")

    def test_its_config_goes_from_download_to_table(self, folder, from_download_to_table):
        table = from_download_to_table("cholecseg8k", folder)
        assert table.keys() == {*open_dataset("cholecseg8k", str(folder), "train").labels, "mean"}
        assert {row["images with it"].split(" of ")[-1] for row in table.values()} == {"3", ""}


class TestUltrasound:
    @pytest.fixture
    def folder(self, tmp_path):
        """Ellipses with smooth edges, drawn large and made smaller; some with alpha, or not quite black behind."""
        inner = tmp_path / "abdominal_US" / "abdominal_US"
        for part, stems in {
            "AUS": ["ct1-1", "ct2-10", "ct13-7"],
            "RUS": ["a2", "a15", "b1", "g3", "h1", "h4", "h20"],
        }.items():
            split = "train" if part == "AUS" else "test"
            for number, stem in enumerate(stems):
                large = Image.new("RGB", (256, 192), (10, 0, 10) if number % 2 else (0, 0, 0))
                pencil = ImageDraw.Draw(large)
                pencil.ellipse((20, 30, 110, 140), fill=COLOURS["liver"])
                pencil.ellipse((140, 40, 230, 150), fill=COLOURS["bones"])
                mask = large.resize((64, 48), Image.Resampling.BICUBIC)
                mask = mask.convert("RGBA") if number % 2 else mask
                save(inner / part / "annotations" / split / f"{stem}.png", np.asarray(mask))
                save(inner / part / "images" / split / f"{stem}.jpg", grey(48, 64))
        return tmp_path

    def test_smooth_edges_and_odd_backgrounds_make_no_other_organ(self, folder):
        for split, count in {"train": 2, "validation": 1, "test": 7}.items():
            dataset = open_dataset("abdominal-us", str(folder), split)
            assert len(dataset) == count
            for index in range(count):
                shares = dict(zip(dataset.labels, dataset[index].masks.mean((1, 2)), strict=True))
                assert {label for label, share in shares.items() if share} == {"liver", "bones"}
                assert shares["liver"] == pytest.approx(np.pi * 45 * 55 / (256 * 192), rel=0.06)

    def test_real_images_are_in_the_test_of_one_fold_each(self, folder):
        tests = []
        for fold in range(1, 6):
            of_split = {
                split: names(open_dataset(f"abdominal-us-real-{fold}", str(folder), split))
                for split in ("train", "validation", "test")
            }
            assert sorted(itertools.chain(*of_split.values())) == ["a15", "a2", "b1", "g3", "h1", "h20", "h4"]
            tests += of_split["test"]
        assert sorted(tests) == ["a15", "a2", "b1", "g3", "h1", "h20", "h4"]
        assert names(open_dataset("abdominal-us", str(folder), "test"))[:2] == ["a2", "a15"]

    def test_a_fold_is_an_argument_or_the_end_of_the_old_name(self, folder):
        for fold in range(1, 6):
            by_name = open_splits(f"abdominal-us-real-{fold}", str(folder))
            by_fold = open_splits("abdominal-us-real", str(folder), fold=fold)
            assert {split: names(by_name[split]) for split in by_name} == {s: names(by_fold[s]) for s in by_fold}
        for name, fold, message in (
            ("abdominal-us-real", None, "fold is None, but abdominal-us-real has 5 folds; give --fold, from 1 to 5"),
            ("abdominal-us-real", 6, "fold is 6, but abdominal-us-real has 5 folds"),
            ("abdominal-us-real-6", None, "fold is 6, but abdominal-us-real has 5 folds"),
            ("abdominal-us-real-0", None, "fold is 0, but abdominal-us-real has 5 folds"),
            ("abdominal-us", 1, "fold is 1, but abdominal-us has no folds; leave it out"),
            ("abdominal-us-1", None, "fold is 1, but abdominal-us has no folds"),
            ("abdominal-us-fake-1", None, "unknown dataset 'abdominal-us-fake-1'; choose from brain-mri"),
        ):
            with pytest.raises(UserError, match=message):
                open_dataset(name, str(folder), "test", fold=fold)

    def test_neighbouring_frames_are_in_one_fold(self, folder):
        tests = [names(open_dataset(f"abdominal-us-real-{fold}", str(folder), "test")) for fold in range(1, 6)]
        assert list(itertools.chain(*tests)) == ["a2", "a15", "b1", "g3", "h1", "h4", "h20"]

    def test_the_edge_between_an_organ_and_black_is_no_liver(self, folder):
        large = Image.new("RGB", (256, 192))
        ImageDraw.Draw(large).ellipse((60, 40, 190, 150), fill=COLOURS["spleen"])
        mask = folder / "abdominal_US" / "abdominal_US" / "RUS" / "annotations" / "test" / "a2.png"
        large.resize((64, 48), Image.Resampling.BICUBIC).save(mask)
        dataset = open_dataset("abdominal-us", str(folder), "test")
        assert [label for label, found in zip(dataset.labels, dataset[0].masks, strict=True) if found.any()] == [
            "spleen"
        ]

    def test_what_is_missing_is_named(self, folder):
        inner = folder / "abdominal_US" / "abdominal_US"
        (inner / "RUS" / "annotations" / "test" / "g3.png").unlink()
        with pytest.raises(UserError, match=r"g3\.jpg has no mask g3\.png"):
            open_dataset("abdominal-us", str(folder), "test")
        shutil.rmtree(inner / "AUS" / "annotations")
        with pytest.raises(UserError, match=r"there is no folder .*AUS/annotations/train"):
            open_dataset("abdominal-us", str(folder), "train")

    def test_the_real_images(self):
        if not (REAL / "abdominal_us").is_dir():
            pytest.skip("the real ultrasound images are not beside this checkout, in ../shared/data/abdominal_us")
        dataset = open_dataset("abdominal-us", str(REAL / "abdominal_us"), "test")
        assert len(dataset) == 40
        present = np.stack([dataset[index].masks.any((1, 2)) for index in range(40)])
        assert present.any(1).all()
        assert present.sum(1).max() <= 4 and 0 < present.mean() < 0.5

    def test_its_config_goes_from_download_to_table(self, folder, from_download_to_table):
        table = from_download_to_table("ultrasound", folder)
        assert table.keys() == {*open_dataset("abdominal-us", str(folder), "train").labels, "mean"}
        assert {row["images with it"].split(" of ")[-1] for row in table.values()} == {"7", ""}


class TestChestXDet:
    @pytest.fixture
    def folder(self, tmp_path):
        square, overlapping = [[2, 2], [10, 2], [10, 10], [2, 10]], [[6, 6], [14, 6], [14, 14], [6, 14]]
        found = {
            "syms": ["Effusion", "Diffuse Nodule"],
            "polygons": [square, overlapping],
            "boxes": [[2, 2, 10, 10]] * 2,
        }
        nothing = {"syms": [], "polygons": [], "boxes": []}
        train = [{"file_name": f"{number}.png", **found} for number in (36199, 69565, 69566)]
        test = [{"file_name": f"{number}.png", **nothing} for number in range(100, 107)]
        for part, records in {"train": train, "test": test}.items():
            (tmp_path / f"ChestX_Det_{part}.json").write_text(json.dumps(records))
            for record in records:
                save(tmp_path / f"{part}_data" / record["file_name"], grey())
        return tmp_path

    def test_findings_overlap_each_in_a_mask_of_its_own(self, folder):
        dataset = open_dataset("chestx-det", str(folder), "train")
        masks = dict(zip(dataset.labels, dataset[0].masks, strict=True))
        assert (masks["Effusion"].sum(), masks["Diffuse Nodule"].sum()) == (81, 81)
        assert (masks["Effusion"] & masks["Diffuse Nodule"]).sum() == 25
        assert not any(masks[label].any() for label in set(dataset.labels) - {"Effusion", "Diffuse Nodule"})

    def test_images_are_split_by_the_papers_number_and_those_without_findings_are_blank(self, folder):
        assert names(open_dataset("chestx-det", str(folder), "train")) == ["36199", "69565"]
        assert names(open_dataset("chestx-det", str(folder), "validation")) == ["69566"]
        assert names(open_dataset("chestx-det", str(folder), "test")) == ["100", "105"]
        everything = open_dataset("chestx-det", str(folder), "test-all")
        assert len(everything) == 7 and not everything[3].masks.any()

    def test_bad_records_and_missing_images_are_named(self, folder):
        shutil.move(folder / "test_data", folder / "anywhere")
        assert len(open_dataset("chestx-det", str(folder), "test")) == 2
        (folder / "anywhere" / "105.png").unlink()
        with pytest.raises(UserError, match=r"1 of the 2 images .* first 105\.png; put the images into .*test_data"):
            open_dataset("chestx-det", str(folder), "test")
        (folder / "thumbnails").mkdir()
        shutil.copy(folder / "anywhere" / "100.png", folder / "thumbnails")
        with pytest.raises(UserError, match=r"100\.png have one name; put the image into"):
            open_dataset("chestx-det", str(folder), "test")
        path = folder / "ChestX_Det_train.json"
        path.write_text(path.read_text().replace("Effusion", "Effusions"))
        with pytest.raises(UserError, match=r"gives 36199\.png the label 'Effusions'"):
            open_dataset("chestx-det", str(folder), "train")

    def test_the_real_annotations(self, tmp_path):
        if not (REAL / "chestxdet").is_dir():
            pytest.skip("the real annotations are not beside this checkout, in ../shared/data/chestxdet")
        counts = {"train": 2625, "validation": 400, "test-all": 553}
        for part in ("train", "test"):
            shutil.copy(REAL / "chestxdet" / f"ChestX_Det_{part}.json", tmp_path)
            for record in json.loads((tmp_path / f"ChestX_Det_{part}.json").read_text()):
                (tmp_path / record["file_name"]).touch()
        for split, count in counts.items():
            dataset = open_dataset("chestx-det", str(tmp_path), split)
            assert len(dataset) == count
        Image.new("L", (1024, 1024)).save(tmp_path / "36346.png")
        sample = next(dataset[index] for index, path in enumerate(dataset.images) if path.name == "36346.png")
        found = [label for label, mask in zip(dataset.labels, sample.masks, strict=True) if mask.any()]
        assert found == ["Effusion", "Cardiomegaly", "Fibrosis", "Consolidation"]

    def test_its_config_goes_from_download_to_table(self, folder, from_download_to_table):
        table = from_download_to_table("chestx-det", folder)
        assert table.keys() == {*open_dataset("chestx-det", str(folder), "train").labels, "mean"}
        assert {row["images with it"].split(" of ")[-1] for row in table.values()} == {"2", ""}


class TestLitsPng:
    @pytest.fixture
    def folder(self, tmp_path):
        inner = tmp_path / "dataset_6" / "dataset_6"
        for patient in range(12):
            for number in range(3):
                liver, lesion = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30, 3), np.uint8)
                if number:
                    liver[4:14, 5:15] = 1
                    lesion[6:9, 7:10] = 1
                save(inner / f"volume-{patient}_{number}.png", grey(seed=patient))
                save(inner / f"segmentation-{patient}_livermask_{number}.png", liver)
                save(inner / f"segmentation-{patient}_lesionmask_{number}.png", lesion)
        # Its columns on empty masks are inverted in the published file, so nobody reads it.
        (tmp_path / "lits_df.csv").write_text("filepath,liver_mask_empty\n../input/lits-png/volume-0_0.png,False\n")
        return tmp_path

    def test_masks_of_zeros_and_ones_are_read_and_blank_slices_are_kept(self, folder):
        dataset = open_dataset("lits-png", str(folder), "train")
        areas = [dataset[index].masks.sum((1, 2)).tolist() for index in range(3)]
        assert areas == [[0, 0], [100, 9], [100, 9]]
        assert dataset.labels == ("liver", "tumor")

    def test_patients_are_not_shared_between_splits_unless_parity_is_asked_for(self, folder):
        def patients(split):
            return {name.split("_")[0] for name in names(open_dataset("lits-png", str(folder), split))}

        train, validation, test = (patients(split) for split in ("train", "validation", "test"))
        assert not (train & validation or train & test or validation & test)
        assert len(train | validation | test) == 12
        assert patients("parity-train") & patients("parity-test")
        shuffled = [names(open_dataset("lits-png", str(folder), f"parity-{split}")) for split in ("train", "test")]
        assert not set(shuffled[0]) & set(shuffled[1])

    def test_a_missing_mask_is_named(self, folder):
        (folder / "dataset_6" / "dataset_6" / "segmentation-0_lesionmask_1.png").unlink()
        with pytest.raises(UserError, match=r"volume-0_1\.png has no mask; put segmentation-0_lesionmask_1\.png"):
            open_dataset("lits-png", str(folder), "train")

    def test_its_config_goes_from_download_to_table(self, folder, from_download_to_table):
        table = from_download_to_table("lits-png", folder)
        assert table.keys() == {*open_dataset("lits-png", str(folder), "train").labels, "mean"}
        assert {row["images with it"].split(" of ")[-1] for row in table.values()} == {"6", ""}


class TestOwnData:
    @pytest.fixture
    def folder(self, tmp_path):
        """Ten pictures of many kinds, with masks whose values labels.json names."""
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[2:6, 3:9], mask[10:12] = 1, 7
        kinds = [
            grey(),
            np.dstack([grey()] * 3),
            np.dstack([grey()] * 4),
            grey().astype(np.uint16) * 200,
        ]
        for number in range(10):
            save(tmp_path / "images" / f"Scan{number}.png", kinds[number % 4])
            save(tmp_path / "masks" / f"scan{number}.png", mask)
        (tmp_path / "labels.json").write_text('{"vessel": 7, "cyst": 1}')
        return tmp_path

    def test_values_are_labels_and_every_image_is_in_one_split(self, folder):
        splits = [open_dataset("own", str(folder), split) for split in ("train", "validation", "test")]
        assert sorted(itertools.chain(*map(names, splits))) == [f"Scan{number}" for number in range(10)]
        assert [len(dataset) for dataset in splits] == [7, 1, 2]
        sample = splits[0][3]
        assert list(splits[0].labels) == ["vessel", "cyst"]
        assert (sample.image.shape, sample.masks.sum((1, 2)).tolist()) == ((20, 30, 3), [60, 24])
        assert [label for label in open_dataset("own", str(folder), "test", ["cyst"]).labels] == ["cyst"]
        with pytest.raises(UserError, match="own has no label 'bone'; choose from vessel, cyst"):
            open_dataset("own", str(folder), "test", ["bone"])

    def test_a_folder_a_label_will_do_and_splits_of_ones_own(self, folder, tmp_path):
        (folder / "labels.json").unlink()
        for split in ("train", "validation", "test"):
            shutil.copytree(folder / "images", folder / split / "images")
            shutil.copytree(folder / "masks", folder / split / "masks" / "cyst")
            shutil.copytree(folder / "masks", folder / split / "masks" / "vessel")
            (folder / split / "masks" / "vessel" / "scan4.png").unlink()
        dataset = open_dataset("own", str(folder), "test")
        assert (len(dataset), list(dataset.labels)) == (10, ["cyst", "vessel"])
        assert dataset[4].masks.any((1, 2)).tolist() == [True, False]

    def test_a_label_may_be_missing_from_a_split_and_is_the_same_in_all(self, folder):
        (folder / "labels.json").unlink()
        for split, labels in {"train": ["cyst", "vessel"], "validation": ["vessel"], "test": ["cyst"]}.items():
            shutil.copytree(folder / "images", folder / split / "images")
            for label in labels:
                shutil.copytree(folder / "masks", folder / split / "masks" / label)
        splits = open_splits("own", str(folder))
        assert {tuple(dataset.labels) for dataset in splits.values()} == {("cyst", "vessel")}
        present = {split: dataset[0].masks.any((1, 2)).tolist() for split, dataset in splits.items()}
        assert present == {"train": [True, True], "validation": [False, True], "test": [True, False]}

    def test_labels_listed_in_another_order_in_a_split_are_still_themselves(self, folder):
        for split in ("train", "validation", "test"):
            shutil.copytree(folder / "images", folder / split / "images")
            shutil.copytree(folder / "masks", folder / split / "masks")
        (folder / "test" / "labels.json").write_text('{"cyst": 1, "vessel": 7}')
        areas = {split: dataset[0].masks.sum((1, 2)).tolist() for split, dataset in open_splits("own", folder).items()}
        assert areas["test"] == areas["train"] == [60, 24]
        shutil.rmtree(folder / "validation")
        with pytest.raises(UserError, match=r"has folders for its splits, but none for validation; add .*images"):
            open_splits("own", folder)

    def test_names_may_have_dots_and_hidden_folders_are_no_labels(self, folder):
        for number in range(10):
            for kind, stem in (("images", "Scan"), ("masks", "scan")):
                (folder / kind / f"{stem}{number}.png").rename(folder / kind / f"1.2.{number}.png")
        assert names(open_dataset("own", str(folder), "test")) == ["1.2.7", "1.2.9"]
        (folder / "labels.json").unlink()
        shutil.copytree(folder / "masks", folder / "copy")
        shutil.move(folder / "copy", folder / "masks" / "cyst")
        (folder / "masks" / ".ipynb_checkpoints").mkdir()
        assert open_dataset("own", str(folder), "test").labels == ("cyst",)

    def test_a_volume_is_read_slice_by_slice(self, tmp_path):
        scan = np.random.default_rng(0).normal(0, 400, (12, 9, 5)).astype(np.float32)
        mask = np.zeros((12, 9, 5), dtype=np.uint8)
        mask[2:5, 6, 3] = 1
        for patient in range(10):
            for kind, values in {"images": scan, "masks": mask}.items():
                (tmp_path / kind).mkdir(exist_ok=True)
                file = tmp_path / kind / f"patient{patient}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
        (tmp_path / "labels.json").write_text('{"lesion": 1}')
        dataset = open_dataset("own", str(tmp_path), "validation")
        assert names(dataset) == [f"patient3_{number:03}" for number in range(5)]
        sample = dataset[3]
        assert (sample.image.shape, sample.masks.shape) == ((9, 12, 3), (1, 9, 12))
        assert np.argwhere(sample.masks[0]).tolist() == [[2, 2], [2, 3], [2, 4]]
        low, high = scan.min(), scan.max()
        np.testing.assert_allclose(sample.image[2, 3, 0], (scan[3, 6, 3] - low) / (high - low), rtol=1e-5)

    def test_bad_masks_are_named(self, folder):
        save(folder / "masks" / "scan0.png", np.full((20, 30), 3, dtype=np.uint8))
        with pytest.raises(UserError, match=r"scan0\.png holds 3, which belong to no label; known are \[0, 1, 7\]"):
            open_dataset("own", str(folder), "train")[0]
        save(folder / "masks" / "scan0.png", np.zeros((5, 5), dtype=np.uint8))
        with pytest.raises(UserError, match=r"scan0\.png is 5x5 pixels, its image 30x20"):
            open_dataset("own", str(folder), "train")[0]
        green = np.zeros((20, 30, 3), dtype=np.uint8)
        green[4, :, 1] = 255
        save(folder / "masks" / "scan0.png", green)
        with pytest.raises(UserError, match=r"scan0\.png is a mask in colours; save it with one channel"):
            open_dataset("own", str(folder), "train")[0]
        (folder / "masks" / "scan0.png").rename(folder / "masks" / "0scan.png")
        with pytest.raises(UserError, match=r"Scan0\.png has no mask scan0 .* and there is 0scan\.png"):
            open_dataset("own", str(folder), "train")
        (folder / "labels.json").write_text('{"vessel": 7, "../cyst": 1}')
        with pytest.raises(UserError, match=r"has the label '\.\./cyst'; its name is also a folder name"):
            open_dataset("own", str(folder), "train")
        (folder / "labels.json").write_text('{"vessel": "7"}')
        with pytest.raises(
            UserError, match=r"labels\.json gives 'vessel' the value '7'; it must give each label a whole"
        ):
            open_dataset("own", str(folder), "train")
        (folder / "labels.json").unlink()
        with pytest.raises(UserError, match=r"the labels of .*masks are unknown: put a labels\.json beside it"):
            open_dataset("own", str(folder), "train")


def test_folders_that_are_not_there_or_too_small_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"holds no folder images; add it, with the images"):
        open_dataset("own", str(tmp_path), "train")
    for number in range(5):
        save(tmp_path / "images" / f"{number}.png", grey())
    with pytest.raises(UserError, match=r"holds no folder masks; add it, with a mask for each, or a folder for each"):
        open_dataset("own", str(tmp_path), "train")
    for number in range(5):
        save(tmp_path / "masks" / "cyst" / f"{number}.png", grey())
    with pytest.raises(UserError, match=r"holds 5 images, too few for the split test: give ten, or folders train"):
        open_dataset("own", str(tmp_path), "test")
    (tmp_path / "labels.json").write_text('{"cyst": 1}')
    with pytest.raises(UserError, match=r"0\.png has no mask 0 in .*: remove it to use folders of masks"):
        open_dataset("own", str(tmp_path), "train")
