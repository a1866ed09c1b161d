"""Readers of the public datasets: images, masks, disjoint splits, and errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam_medical.common.errors import UserError
from sam_medical.data.augmentation import AUGMENTATIONS
from sam_medical.data.base import read_image
from sam_medical.data.brain_mri import slices_of
from sam_medical.data.loading import TrainingSampler, spread, thinned, training_loader
from sam_medical.data.opening import open_dataset


class TestBrainMri:
    def test_splits_are_three_slices_apart_and_tests_lie_between_trained_slabs(self):
        split_of = {z: split for split in ("train", "validation", "test") for z in slices_of(split)}
        for z, split in split_of.items():
            for distance in (1, 2, 3):
                assert split_of.get(z + distance, split) == split
        test = open_dataset("brain-mri", None, "test")
        shown = [z for i, z in enumerate(slices_of("test")) if test[i].masks.any()]
        assert min(slices_of("train")) < min(shown) and max(shown) < max(slices_of("train"))

    def test_labels_are_tissue_of_the_brain_and_absent_from_some_slices(self):
        test = open_dataset("brain-mri", None, "test")
        samples = [test[i] for i in range(len(test))]
        assert test.labels == ("brain", "gray matter", "white matter")
        for sample in samples:
            brain, gray, white = sample.masks
            assert not (gray & white).any()
            if brain.any():
                assert sample.image[brain].mean() > 5 * sample.image[~brain].mean()
            if white.sum() > 500:
                assert sample.image[white].mean() > sample.image[gray].mean() > 0
        absent = np.sum([~sample.masks.any((1, 2)) for sample in samples], axis=0)
        assert absent.any() and (absent < len(samples) / 4).all()


class TestGlas:
    def test_masks_are_above_zero_and_belong_to_their_image(self, glas_folder):
        test = open_dataset("glas", str(glas_folder), "test")
        assert [test[i].name for i in range(len(test))] == ["testA_1", "testA_2"]
        sample = test[0]
        assert sample.image.shape == (40, 56, 3) and sample.masks.shape == (1, 40, 56)
        inside, outside = sample.image[sample.masks[0]].mean(0), sample.image[~sample.masks[0]].mean(0)
        assert inside[1] < 0.3 < 0.7 < outside[1]

    def test_validation_is_held_out_of_train_and_test_is_neither(self, glas_folder):
        names = {
            split: {open_dataset("glas", str(glas_folder), split)[i].name for i in range(count)}
            for split, count in (("train", 6), ("validation", 1), ("testA", 2), ("testB", 1))
        }
        assert names["train"] | names["validation"] == {f"train_{n}" for n in range(1, 8)}
        assert names["validation"] == {"train_6"}

    def test_the_inner_folder_and_other_extensions_will_do(self, glas_folder):
        inner = glas_folder / "Warwick_QU_Dataset"
        for path in inner.glob("testA_*.bmp"):
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
        assert len(open_dataset("glas", str(inner), "test")) == 2

    def test_capital_letters_will_do_and_two_files_of_one_name_will_not(self, glas_folder):
        inner = glas_folder / "Warwick_QU_Dataset"
        for name in ("testA_1", "testA_1_anno"):
            (inner / f"{name}.bmp").rename(inner / f"{name}.BMP")
        assert len(open_dataset("glas", str(glas_folder), "test")) == 2
        Image.open(inner / "testA_2.bmp").save(inner / "testA_2.png")
        with pytest.raises(UserError, match=r"holds both testA_2\.bmp and testA_2\.png; remove one"):
            open_dataset("glas", str(glas_folder), "test")

    def test_its_config_goes_from_download_to_table(self, glas_folder, from_download_to_table):
        table = from_download_to_table("glas", glas_folder)
        assert table.keys() == {"glands", "mean"} and table["glands"]["images with it"] == "2 of 2"

    def test_real_images(self):
        root = Path(__file__).parents[3] / "shared" / "data" / "glas"
        if not root.is_dir():
            pytest.skip("the real GlaS images are not beside this checkout, in ../shared/data/glas")
        sizes = {split: len(open_dataset("glas", str(root), split)) for split in ("train", "validation", "test")}
        assert sizes == {"train": 71, "validation": 14, "test": 60}
        sample = open_dataset("glas", str(root), "test")[0]
        assert sample.image.shape == (522, 775, 3) and sample.masks.shape == (1, 522, 775)
        inside, outside = sample.image[sample.masks[0]].mean(), sample.image[~sample.masks[0]].mean()
        assert 0.05 < sample.masks.mean() < 0.95 and abs(inside - outside) > 0.02

    def test_bad_folders_and_files_are_named(self, glas_folder, tmp_path):
        folder = glas_folder / "Warwick_QU_Dataset"
        with pytest.raises(UserError, match="needs --data-root"):
            open_dataset("glas", None, "train")
        with pytest.raises(UserError, match=r"there is no folder .*/nowhere"):
            open_dataset("glas", str(tmp_path / "nowhere"), "train")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="holds no images of the split train"):
            open_dataset("glas", str(tmp_path / "empty"), "train")

        (folder / "testA_2_anno.bmp").rename(folder / "lost.bmp")
        with pytest.raises(UserError, match=r"testA_2\.bmp has no mask; put testA_2_anno\.bmp beside it"):
            open_dataset("glas", str(glas_folder), "test")
        Image.new("L", (3, 3)).save(folder / "testA_2_anno.bmp")
        with pytest.raises(UserError, match=r"testA_2_anno\.bmp is 3x3 pixels, its image 48x48"):
            open_dataset("glas", str(glas_folder), "test")[1]
        (folder / "testA_1.bmp").write_bytes(b"BM not an image")
        with pytest.raises(UserError, match=r"testA_1\.bmp cannot be read as an image"):
            open_dataset("glas", str(glas_folder), "test")[0]


@pytest.mark.parametrize("name, deep", [("a.png", np.uint16), ("a.tif", np.int32), ("b.tif", np.float32)])
def test_deep_grey_images_are_stretched_and_not_clipped(tmp_path, name, deep):
    ramp = np.linspace(-1000 if deep is not np.uint16 else 0, 4000, 30).reshape(5, 6).astype(deep)
    Image.fromarray(ramp).save(tmp_path / name)
    expected = (ramp - ramp.min()) / np.ptp(ramp.astype(float))
    image = read_image(tmp_path / name)
    assert image.shape == (5, 6, 3) and image.dtype == np.float32
    np.testing.assert_allclose(image, np.repeat(expected[..., None], 3, axis=2), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_images_of_any_mode_become_three_channels(tmp_path, mode):
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours).convert(mode)
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "image.png"), np.asarray(image.convert("RGB")) / np.float32(255)
    )


def test_unknown_names_are_answered_with_the_known_ones(glas_folder):
    with pytest.raises(UserError, match=r"unknown dataset 'lits'; choose from brain-mri, .*lits-png, glas, own"):
        open_dataset("lits", None, "train")
    with pytest.raises(UserError, match="no split 'val'; choose from train, validation, test"):
        open_dataset("brain-mri", None, "val")
    with pytest.raises(UserError, match="no label 'tumor'; choose from brain, gray matter, white matter"):
        open_dataset("brain-mri", None, "train", ["brain", "tumor"])


def test_labels_can_be_chosen_in_any_order():
    everything, some = (
        open_dataset("brain-mri", None, "test"),
        open_dataset("brain-mri", None, "test", ["white matter", "brain"]),
    )
    assert some.labels == ("white matter", "brain")
    np.testing.assert_array_equal(some[0].masks, everything[0].masks[[2, 0]])


def test_sampler_shuffles_whole_epochs_and_can_begin_anywhere():
    whole = list(TrainingSampler(images=5, seed=3, first=0, last=12))
    for epoch in (0, 1):
        assert sorted(whole[5 * epoch : 5 * epoch + 5]) == [(epoch, index) for index in range(5)]
    assert [index for _, index in whole[:5]] != [index for _, index in whole[5:10]]
    assert list(TrainingSampler(images=5, seed=3, first=7, last=12)) == whole[7:]
    assert list(TrainingSampler(images=5, seed=4, first=0, last=12)) != whole


def test_fewer_images_are_spread_from_the_first_to_the_last():
    images = list("abcdefghij")
    assert spread(images, 4) == ["a", "d", "g", "j"] and spread(images, 0) == []
    assert thinned(images, 10) is thinned(images, 99) is thinned(images, None) is images


def test_an_image_that_is_not_kept_is_read_again_and_is_the_same(glas_folder):
    dataset = open_dataset("glas", str(glas_folder), "train")
    reads = []
    read, dataset.read = dataset.read, lambda index: reads.append(index) or read(index)

    def two_epochs(**keeping):
        reads.clear()
        return [batch["images"] for batch in training_loader(dataset, 32, 2, "upright", 0, 0, 12, **keeping)]

    kept = two_epochs()
    assert sorted(reads) == list(range(6))
    for image, again in zip(kept, two_epochs(kept_bytes=0), strict=True):
        assert torch.equal(image, again)
    assert len(reads) == 12


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmented_masks_stay_on_their_image_and_do_not_depend_on_what_came_before(glas_folder, augmentation):
    dataset = open_dataset("glas", str(glas_folder), "train")

    def batches(first):
        return list(training_loader(dataset, 32, 2, augmentation, seed=0, first=first, last=12))

    whole = batches(first=0)
    for batch in whole:
        assert batch["images"].shape == (2, 3, 32, 32) and set(batch["masks"].unique().tolist()) <= {0.0, 1.0}
        green, glands = batch["images"][:, 1], batch["masks"][:, 0] > 0
        assert green[glands].mean() < green[~glands].mean() - 0.2
    for batch, again in zip(whole[4:], batches(first=8), strict=True):
        assert (batch["images"] == again["images"]).all() and (batch["masks"] == again["masks"]).all()
    assert not (whole[0]["images"] == whole[1]["images"]).all()
