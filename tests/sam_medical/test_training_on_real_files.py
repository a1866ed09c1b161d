"""Training on real file formats: notes about the input, small structures, and unusable data."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_real_files import disk, save, save_nifti, say

from sam_medical.adapters.task import Task, read_task
from sam_medical.cli import evaluate, inspect_data, predict, train
from sam_medical.common.errors import UserError
from sam_medical.data.augmentation import AUGMENTATIONS, build_augmentation
from sam_medical.data.base import Sample
from sam_medical.data.loading import Framing, evaluation_loader, training_loader
from sam_medical.data.opening import open_dataset
from sam_medical.data.sides import labels_with_a_side
from sam_medical.evaluation import segmenter
from sam_medical.evaluation.report import draw_contact_sheet, draw_overlays
from sam_medical.models.text import check_distinct, encode_labels


@pytest.fixture
def options(tiny_sam_folder, tiny_clip_folder, tmp_path):
    return {
        "dataset": "own",
        "data_root": tmp_path / "data",
        "output_dir": tmp_path / "run",
        "backbone": tiny_sam_folder,
        "text_encoder": tiny_clip_folder,
        "image_size": 32,
        "steps": 2,
        "batch_size": 2,
        "warmup_steps": 1,
        "validate_every": 2,
        "overlays": 1,
    }


@pytest.fixture
def small_lesions(tmp_path):
    """Pictures of 120 x 100 pixels with spots of 2 x 2."""
    random = np.random.default_rng(0)
    for index in range(10):
        mask = np.zeros((100, 120), np.uint8)
        for row, column in random.integers(5, 90, (4, 2)):
            mask[row : row + 2, column : column + 2] = 1
        save(
            tmp_path / f"data/images/f{index}.png", random.integers(90, 140, (100, 120)).astype(np.uint8) + 100 * mask
        )
        save(tmp_path / f"data/masks/f{index}.png", mask)
    say(tmp_path / "data", {"spot": 1})
    return tmp_path / "data"


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


class TestSmallThings:
    def test_training_warns_where_a_label_vanishes_and_tiles_keep_it(self, run, options, small_lesions, capsys):
        run(train, **options)
        (note,) = notes(capsys)
        assert '"spot" vanishes at the model\'s size from 7 of the 7 training images' in note and "--tile 256" in note
        run(train, **options, tile=32, overwrite=True)
        assert notes(capsys) == []
        adapter = options["output_dir"] / "adapter"
        assert read_task(adapter).tile == 32
        run(evaluate, adapter=adapter, data_root=options["data_root"], output=options["output_dir"] / "again.json")
        again = json.loads((options["output_dir"] / "again.json").read_text())["test"]
        whole = json.loads((options["output_dir"] / "metrics.json").read_text())["test"]
        assert again == whole

    def test_half_of_the_crops_are_around_a_label_at_full_resolution(self, small_lesions):
        dataset = open_dataset("own", str(small_lesions), "train")
        batches = list(training_loader(dataset, Framing(16, tile=16), 1, "none", seed=0, first=0, last=60))
        areas = [int(batch["masks"].sum()) for batch in batches]
        assert {tuple(batch["images"].shape) for batch in batches} == {(1, 3, 16, 16)}
        assert np.mean([area > 0 for area in areas]) > 0.4 and max(areas) >= 4
        bright = [
            batch["images"].mean(1)[batch["masks"][:, 0] > 0].mean() for batch in batches if batch["masks"].any()
        ]
        assert min(bright) > 0.7

    def test_pictures_smaller_than_a_tile_are_padded(self, small_lesions):
        dataset = open_dataset("own", str(small_lesions), "train")
        (batch,) = training_loader(dataset, Framing(256, tile=256), 1, "none", seed=0, first=0, last=1)
        assert batch["images"].shape == (1, 3, 256, 256) and batch["images"][..., 100:, :].max() == 0

    def test_padding_keeps_the_aspect(self):
        image = np.ones((10, 40, 3), np.float32)
        samples = [Sample("a", image, np.ones((1, 10, 40), bool))]
        (batch,) = evaluation_loader(samples, Framing(40, fit="pad"), 1)
        assert batch["images"][0, 0, :10].min() > 0.9 and batch["images"][0, 0, 12:].max() < 0.1
        assert batch["masks"][0, 0].sum() == pytest.approx(400, abs=1)

    @pytest.mark.parametrize("height, width", [(1, 200), (300, 3), (3, 3000)])
    def test_thin_pictures_are_trained_on_and_drawn(self, run, options, tmp_path, height, width):
        for index in range(10):
            mask = np.zeros((height, width), np.uint8)
            mask[: max(1, height // 3), : max(1, width // 3)] = 1
            save(tmp_path / f"data/images/{index}.png", mask * np.uint8(150))
            save(tmp_path / f"data/masks/{index}.png", mask)
        say(tmp_path / "data", {"cyst": 1})
        run(train, **options)
        (picture,) = (tmp_path / "run/overlays").iterdir()
        assert max(Image.open(picture).size) < 2000

    def test_drawing_takes_no_more_than_a_panel_can_show(self, tmp_path):
        tall = Sample("tall", np.zeros((3000, 3, 3), np.float32), np.ones((1, 3000, 3), bool))
        draw_overlays([(tall, tall.masks)], ["cyst"], tmp_path)
        wide = Sample("wide", np.broadcast_to(np.float32(0), (14000, 14000, 3)), np.zeros((1, 14000, 14000), bool))
        draw_contact_sheet({"train": ([tall, wide], ["cyst"])}, tmp_path / "sheet.png")
        assert max(max(Image.open(path).size) for path in tmp_path.iterdir()) < 3000


class TestLabels:
    def test_names_that_the_encoder_takes_for_one_are_refused(self):
        for labels in (["肝脏", "脾脏", "胰腺"], ["Leber", "leber"]):
            with pytest.raises(UserError, match=f"apart: {', '.join(labels)}. Give other names, .*--prompt learned"):
                check_distinct(encode_labels("minilm", labels), labels, "minilm")
        check_distinct(encode_labels("minilm", ["left kidney", "right kidney", "tumor"]), ["l", "r", "t"], "minilm")

    def test_they_are_refused_before_training_and_learned_as_tokens(self, run, options, tmp_path, capsys):
        for index in range(10):
            mask = np.zeros((32, 32), np.uint8)
            mask[4:12], mask[16:24] = 1, 2
            save(tmp_path / f"data/images/{index}.png", mask * np.uint8(60 + index))
            save(tmp_path / f"data/masks/{index}.png", mask)
        say(tmp_path / "data", {"肝脏": 1, "脾脏": 2})
        with pytest.raises(SystemExit) as stop:
            run(train, **{**options, "text_encoder": "minilm"})
        assert stop.value.code and not (tmp_path / "run").exists()
        run(train, **{**options, "text_encoder": "minilm"}, prompt="learned")
        adapter = tmp_path / "run/adapter"
        tensors = load_file(adapter / "adapter_model.safetensors")
        (tokens,) = [tensor for name, tensor in tensors.items() if name.endswith("prompts.tokens.weight")]
        assert tokens.shape == (2, 256) and not (adapter / "text_embeddings.safetensors").exists()
        run(evaluate, adapter=adapter, data_root=options["data_root"], output=tmp_path / "again.json")
        metrics = json.loads((tmp_path / "run/metrics.json").read_text())
        assert json.loads((tmp_path / "again.json").read_text())["test"] == metrics["test"]
        with pytest.raises(SystemExit):
            run(train, **options, method="samed", prompt="learned", overwrite=True)

    @pytest.mark.parametrize(
        "labels, sided",
        [
            (["left kidney", "right kidney", "spleen"], ["left kidney", "right kidney"]),
            (["Kidney_L", "Kidney_R"], ["Kidney_L", "Kidney_R"]),
            (["rein gauche"], ["rein gauche"]),
            (["leftLung", "heart"], ["leftLung"]),
            (["左肾", "右肾"], ["左肾", "右肾"]),
            (["leftkidney", "rightkidney", "spleen"], ["leftkidney", "rightkidney"]),
            (["LK", "RK", "liver"], ["LK", "RK"]),
            (["LCA", "RCA"], ["LCA", "RCA"]),
            (["disc OD", "disc OS", "cup"], ["disc OD", "disc OS"]),
            (["kidney_l", "kidney_r"], ["kidney_l", "kidney_r"]),
            (["kidneyleft", "kidneyright"], ["kidneyleft", "kidneyright"]),
            (["nierelinks", "niererechts"], ["nierelinks", "niererechts"]),
            (["bright spot", "L1", "cleft"], []),
            (["lung", "rib", "liver", "renal", "lesion", "over"], []),
        ],
    )
    def test_labels_with_a_side_are_known(self, labels, sided):
        assert labels_with_a_side(labels) == sided

    @pytest.mark.parametrize("kind", AUGMENTATIONS)
    def test_their_views_are_not_mirrored(self, kind):
        corner = torch.zeros(1, 32, 32)
        corner[:, 8:14, 3:12] = 1  # and a tail that tells a shape from its mirror image
        corner[:, 14:20, 3:6] = 1
        item = {"images": corner.repeat(3, 1, 1), "masks": corner}

        def handedness(labels):
            views = build_augmentation(kind, labels)
            views.set_random_state(0)
            return {_turns(np.asarray(views(dict(item))["masks"])[0] > 0.5) for _ in range(40)}

        assert handedness(["left kidney", "right kidney"]) == {_turns(np.asarray(corner)[0] > 0.5)}
        assert (len(handedness(["kidney"])) == 2) == (kind != "none")

    def test_a_label_that_no_training_image_has_is_said_and_kept_out_of_means(self, run, options, tmp_path, capsys):
        for split, value in (("train", 1), ("validation", 2), ("test", 1)):
            for index in range(3):
                picture = disk() * np.uint8(150) + np.uint8(10 * index + 3 * value + len(split))
                save(tmp_path / f"data/{split}/images/{index}.png", picture)
                save(tmp_path / f"data/{split}/masks/{index}.png", disk() * np.uint8(value))
        say(tmp_path / "data", {"cyst": 1, "stone": 2})
        run(train, **options)
        said = capsys.readouterr().out
        assert 'note: no training image has the label "stone"' in said and "not in the mean: stone." in said
        scores = json.loads((tmp_path / "run/metrics.json").read_text())["test"]
        assert scores["mean_dice"] == scores["labels"]["cyst"]["dice"] and not scores["labels"]["stone"]["trained"]
        assert read_task(tmp_path / "run/adapter").absent == ("stone",)


def _turns(mask):
    """Which way an L turns, however it is rotated: the sign of a moment that a mirror changes."""
    y, x = np.nonzero(mask)
    points = np.stack([x - x.mean(), y - y.mean()]).astype(float)
    _, vectors = np.linalg.eigh(points @ points.T)
    along, across = vectors[:, 1] @ points, vectors[:, 0] @ points
    sign = np.sign((along**3).sum()) * np.sign((along**2 * across).sum()) * np.sign(np.linalg.det(vectors[:, ::-1]))
    return int(sign)


class TestIntensity:
    @pytest.fixture
    def ct(self, tmp_path):
        random = np.random.default_rng(0)
        for patient in range(10):
            scan = random.normal(-1000, 10, (16, 16, 2))
            scan[2:14, 2:14] = random.normal(60, 10, (12, 12, 2))
            save_nifti(tmp_path / f"data/images/p{patient}.nii.gz", scan.astype(np.int16))
            save_nifti(tmp_path / f"data/masks/p{patient}.nii.gz", (scan > 0).astype(np.uint8))
        say(tmp_path / "data", {"tissue": 1})
        return tmp_path / "data"

    def test_it_is_said_kept_in_the_adapter_and_used_again(self, run, options, ct, tmp_path, capsys, monkeypatch):
        run(train, **options)
        assert notes(capsys) == ["note: intensity auto is auto:ct here, and stored in the adapter."]
        task = read_task(tmp_path / "run/adapter")
        assert (task.intensity, task.plane) == ("auto:ct", "axial")
        seen = []
        read = segmenter.Slices.__getitem__

        def spy(slices, index):
            seen.append(read(slices, index).image)
            return read(slices, index)

        monkeypatch.setattr(segmenter.Slices, "__getitem__", spy)
        run(predict, adapter=tmp_path / "run/adapter", images=ct / "images/p0.nii.gz", output=tmp_path / "masks")
        assert seen[0][6:10, 6:10].mean() == pytest.approx(220 / 400, abs=0.02) and seen[0][0].max() == 0

    def test_adapters_made_before_are_read_as_they_were(self, tmp_path):
        task = Task("own", ("tissue",), "lite-medsam", 32, "minilm")
        assert task.reading.intensity == "legacy" and task.reading.plane == "stored"
        scan = np.random.default_rng(0).normal(0, 50, (6, 5, 4)).astype(np.float32)
        save_nifti(tmp_path / "a.nii.gz", scan, np.diag([-1.0, -1, 1, 1]))
        from sam_medical.data.folder import Slices
        from sam_medical.data.sources import source_of_file

        picture = Slices(source_of_file(tmp_path / "a.nii.gz"), task.reading)[2].image
        plane = scan[:, :, 2].T[::-1]
        np.testing.assert_allclose(picture[..., 0], (plane - scan.min()) / np.ptp(scan), rtol=1e-5)


class TestInspectData:
    def test_everything_is_counted_drawn_and_dumped(self, run, small_lesions, tmp_path, capsys):
        files = {name: tmp_path / name for name in ("sheet", "json", "dump")}
        run(inspect_data, data_root=small_lesions, image_size=32, **files)
        said = capsys.readouterr().out
        assert "train: 7 images of 120x100" in said and "| spot | 7 (100 %) |" in said and "gone from 7" in said
        train = json.loads(files["json"].read_text())["splits"]["train"]
        assert train["labels"]["spot"]["images_it_vanishes_from"] == 7
        assert train["labels"]["spot"]["contrast"] == pytest.approx(100 / 255, abs=0.03)
        assert Image.open(files["sheet"]).size[0] > 400
        assert sorted(path.name for path in (files["dump"] / "test").iterdir()) == ["f7.npz", "f9.npz"]
        with np.load(files["dump"] / "test/f7.npz") as dumped:
            assert dumped["image"].shape == (100, 120, 3) and dumped["image"].dtype == np.float32
            assert dumped["masks"].dtype == bool and dumped["labels"].tolist() == ["spot"]
            bright = dumped["image"].mean(2)[dumped["masks"][0]].mean()
        assert bright == pytest.approx((115 + 100) / 255, abs=0.05)

    def test_volumes_are_described_and_copies_in_two_splits_are_named(self, run, tmp_path, capsys):
        for patient in range(10):
            scan = np.random.default_rng(patient % 7).normal(0, 9, (8, 9, 2)).astype(np.float32)
            scan += patient == 8  # another one than that of patient 1
            scan[:, 3:] *= 1 + (patient >= 8)
            save_nifti(tmp_path / f"images/p{patient}.nii.gz", scan, np.diag([-2.0, 1, 3, 1]))
            save_nifti(tmp_path / f"masks/p{patient}.nii.gz", (scan > 0).astype(np.uint8), np.diag([-2.0, 1, 3, 1]))
        say(tmp_path, {"thing": 1})
        run(inspect_data, data_root=tmp_path)
        said = capsys.readouterr().out
        assert "7 files: float32, LAS, 2.0 x 1.0 x 3.0 mm" in said and "percentiles of the foreground" in said
        assert "2 images are in two splits, first p0_000 of train, which is p7_000 of test" in said

    def test_masks_that_are_all_of_each_image_are_said(self, run, tmp_path, capsys):
        for index in range(10):
            save(tmp_path / f"images/{index}.png", disk() * np.uint8(20 * index + 40))
            save(tmp_path / f"masks/cyst/{index}.png", np.full((48, 64), 255, np.uint8))
        run(inspect_data, data_root=tmp_path)
        assert notes(capsys) == [
            'note: "cyst" covers all of each of the 7 training images that have it; look at the masks'
        ]

    def test_a_bad_mask_ends_in_one_line(self, run, small_lesions, capsys):
        os.remove(small_lesions / "masks/f3.png")
        with pytest.raises(SystemExit):
            run(inspect_data, data_root=small_lesions)
        said = capsys.readouterr()
        assert "f3.png has no mask f3" in said.out and "error: train: " in said.err and "f3.png has no" in said.err
