"""Three lines of Python: load, segment, save; the same masks as `sam-medical predict` writes."""

import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from stand_ins import BrightPixels

import sam_medical
from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.evaluation import segmenter


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`sam_medical.load` with `BrightPixels` in place of an adapter's model."""

    def load(method="s-sam", intensity="auto", **options):
        task = Task("own", ("bright", "dark"), "lite-medsam", 24, "minilm", intensity=intensity, method=method)
        monkeypatch.setattr(segmenter, "read_task", lambda folder: task)
        monkeypatch.setattr(segmenter, "load_adapter", lambda folder, backbone=None: (BrightPixels(), task))
        return sam_medical.load(tmp_path, **options)

    return load


def picture(shape=(24, 24)):
    values = np.full(shape, 40, np.uint8)
    values[4:12, 6:16] = 220
    return values


def test_a_picture_and_the_same_array_give_masks_of_their_shape(load, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(), np.repeat(picture()[..., None], 3, 2)):
        result = load().segment(image)
        assert list(result.masks) == ["bright", "dark"] and result.affine is None
        np.testing.assert_array_equal(result.masks["bright"], picture() > 100)
        np.testing.assert_array_equal(result.masks["dark"], ~result.masks["bright"])
        probability = result.probabilities["bright"]
        assert probability.dtype == np.float32 and (probability[result.masks["bright"]] > 0.5).all()
        assert result.measures["bright"]["pixels"] == 80


def test_a_volume_gives_masks_on_its_own_grid_and_millilitres(load, tmp_path):
    values = np.random.default_rng(0).normal(0, 5, (24, 20, 6)).astype(np.float32)
    values[3:9, 2:8, 1:4] += 800
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, -3, 2], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    result = load().segment(tmp_path / "a.nii.gz")
    mask = result.masks["bright"]
    assert mask.shape == values.shape
    both = (mask & (values > 400)).sum()
    assert 2 * both / (mask.sum() + (values > 400).sum()) > 0.8  # its model sees a square of 24 pixels
    assert result.measures["bright"]["ml"] == pytest.approx(mask.sum() * 9 / 1000)
    np.testing.assert_array_equal(result.affine, affine)


def test_what_is_saved_is_what_predict_writes(load, run, tmp_path):
    from sam_medical.cli import predict

    (tmp_path / "images" / "inner").mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "images" / "inner" / "a.png")
    Image.fromarray(picture((30, 26))).save(tmp_path / "images" / "b.png")
    for result in load().segment_all(tmp_path / "images"):
        assert result.save(tmp_path / "mine", probabilities=True) == {}
    options = {"adapter": tmp_path, "images": tmp_path / "images", "probabilities": True}
    run(predict, **options, output=tmp_path / "theirs")
    files = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.png")}
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_an_overlay_shows_the_slice_with_most_of_a_label(load, tmp_path):
    values = np.full((24, 24, 3), 40, np.int16)
    values[4:8, 4:8, 0], values[4:16, 4:16, 2] = 220, 220
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    result = load().segment(tmp_path / "a.nii.gz")
    found = result.masks_of_slices[:1].sum((0, 2, 3))
    # Of the label that is drawn alone, since the other one fills whatever is left.
    result = replace(result, masks_of_slices=result.masks_of_slices[:1], labels=("bright",))
    shown = [np.asarray(result.overlay(number)) for number in range(3)]
    np.testing.assert_array_equal(np.asarray(result.overlay()), shown[int(found.argmax())])
    assert shown[0].shape[2] == 3 and not any(np.array_equal(shown[0], other) for other in shown[1:])


def test_the_threshold_and_the_largest_part(load):
    image = picture()
    image[20:22, 20:22] = 220
    whole, largest = load().segment(image), load(largest_component=True).segment(image)
    assert whole.measures["bright"]["pixels"] == 84 and largest.measures["bright"]["pixels"] == 80
    assert load(threshold=0.9999).segment(image).measures["bright"]["pixels"] == 0
    assert load(threshold=0.9999).segment(image).measures["bright"]["mean_probability"] is None


def test_what_it_cannot_segment_it_refuses(load, tmp_path):
    with pytest.raises(UserError, match=r"an array of shape \(3, 4, 4\) is no picture"):
        load().segment(np.zeros((3, 4, 4)))
    with pytest.raises(UserError, match=r"there is no folder .*nothing"):
        load().segment(tmp_path / "nothing")
    for name in ("a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    with pytest.raises(UserError, match=r"holds 2 images; give one of them, or use segment_all"):
        load().segment(tmp_path)
    with pytest.raises(UserError, match=r"SonoSAM needs a point in each label"):
        load(method="sono-sam")


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no task\.json"):
        sam_medical.load(tmp_path)


def test_importing_the_package_imports_no_model():
    code = "import sys, sam_medical; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
