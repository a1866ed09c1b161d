"""The offset of CT values: inferred from all training images, and stored. Doubtful values are reported."""

import json

import numpy as np
import pytest
from test_real_files import disk, save, save_nifti, say
from test_training_on_real_files import notes, options  # noqa: F401 - a fixture

from sam_medical.adapters.task import Task, read_task
from sam_medical.cli import inspect_data, predict, train
from sam_medical.common.errors import UserError
from sam_medical.data.decoding import decode
from sam_medical.data.doubts import doubt_about
from sam_medical.data.offset import looks_like_1024, without_offset
from sam_medical.data.opening import open_dataset, settle_reading
from sam_medical.data.reading import Reading, read_slice
from sam_medical.data.sources import source_of_file
from sam_medical.evaluation import segmenter

HALF, WRAPPED = (lambda hu: hu + 32768), (lambda hu: hu.astype(np.int16).view(np.uint16))


def hounsfield(seed, with_air):
    random = np.random.default_rng(seed)
    hu = 60 + random.integers(-8, 9, (40, 40))
    hu[10:20, 10:20] -= 30
    if with_air:
        hu[:3] = -1000 + random.integers(-8, 9, (3, 40))
    return hu


@pytest.fixture
def ct(tmp_path):
    """Ten pictures of one patient each, of which the third alone has air."""

    def write(store, count=10, with_air=(2,)):
        for number in range(count):
            hu = hounsfield(number, number in with_air)
            save(tmp_path / f"data/images/{number:03}.png", store(hu).astype(np.uint16))
            mask = np.zeros(hu.shape, np.uint8)
            mask[10:20, 10:20] = 1
            save(tmp_path / f"data/masks/{number:03}.png", mask)
        say(tmp_path / "data", {"tumor": 1})
        return tmp_path / "data"

    return write


def settled(root):
    dataset = open_dataset("own", str(root), "train", reading=Reading("auto", offset="auto"))
    dataset.reading = settle_reading(dataset)
    return dataset


@pytest.mark.parametrize("store, offset", [(HALF, "32768"), (WRAPPED, "wrapped")])
@pytest.mark.parametrize("count, with_air", [(10, (2,)), (60, (58,))], ids=["ten", "sixty"])
def test_one_image_with_air_tells_of_all(ct, store, offset, count, with_air):
    dataset = settled(ct(store, count, with_air))
    assert (dataset.reading.offset, dataset.reading.intensity) == (offset, "auto:ct")
    for index in (0, len(dataset) - 1):
        grey = dataset[index].image.mean(2)
        assert grey[12:18, 12:18].mean() == pytest.approx((30 + 160) / 400, abs=0.01)
        assert grey[25:].mean() == pytest.approx((60 + 160) / 400, abs=0.01)


def test_twelve_bits_of_what_is_said_to_be_ct_have_1024_added(tmp_path):
    for case in range(10):
        hu = np.stack([hounsfield(case, True)] * 2, -1)
        save_nifti(tmp_path / f"imagesTr/c_{case:03}_0000.nii.gz", (hu + 1024).astype(np.int16))
        save_nifti(tmp_path / f"labelsTr/c_{case:03}.nii.gz", (hu > 0).astype(np.uint8))
    say(tmp_path, {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}}, "dataset.json")
    dataset = settled(tmp_path)
    assert dataset.reading.offset == "1024"
    assert dataset[0].image[:8, 25:].mean() == pytest.approx((60 + 160) / 400, abs=0.01)
    scan = decode(tmp_path / "imagesTr/c_000_0000.nii.gz")
    assert looks_like_1024(scan) and "may be CT with 1024 added" in doubt_about(
        scan, Reading("auto:percentile", offset="none")
    )


def test_a_file_that_cannot_have_been_stored_so_is_read_as_it_is(tmp_path):
    save_nifti(tmp_path / "hu.nii.gz", hounsfield(0, True)[..., None].astype(np.int16))
    scan = decode(tmp_path / "hu.nii.gz")
    assert without_offset(scan, "1024") is scan and without_offset(scan, "wrapped") is scan


def test_images_that_contradict_each_other_are_named(ct):
    root = ct(HALF, with_air=range(5))
    save(root / "images/004.png", WRAPPED(hounsfield(4, True)))
    with pytest.raises(UserError, match=r"000\.png: 32768 was added.*004\.png: values below zero were wrapped; store"):
        settled(root)


def test_it_is_said_kept_and_used_by_predict(run, options, ct, tmp_path, capsys, monkeypatch):  # noqa: F811
    root = ct(HALF)
    run(train, **options)
    said = notes(capsys)
    assert "note: 32768 was added to its values; stored in the adapter." in said and not any(
        "outside" in n for n in said
    )
    assert read_task(tmp_path / "run/adapter").offset == "32768"
    seen, read = [], segmenter.Slices.__getitem__
    monkeypatch.setattr(segmenter.Slices, "__getitem__", lambda *at: seen.append(read(*at)) or seen[-1])
    run(predict, adapter=tmp_path / "run/adapter", images=root / "images/000.png", output=tmp_path / "masks")
    assert seen[0].image[25:].mean() == pytest.approx((60 + 160) / 400, abs=0.01)


def test_adapters_made_before_decide_image_by_image(ct):
    root = ct(HALF)
    reading = Task("own", ("tumor",), "lite-medsam", 32, "minilm", intensity="auto:ct", plane="axial").reading
    with_air, without = (
        read_slice(source_of_file(root / f"images/{name}.png"), None, reading)[25:].mean() for name in ("002", "000")
    )
    assert with_air == pytest.approx((60 + 160) / 400, abs=0.01) and without == 1


def test_what_comes_out_black_or_white_is_said(run, tmp_path, capsys):
    for number in range(10):
        low = np.random.default_rng(number).integers(0, 4, (12, 12, 2)).astype(np.uint8)
        deep = np.full((12, 12, 2), 700, np.int16)
        for name, values in {"dark": low, "flat": deep}.items():
            save_nifti(tmp_path / f"{name}/images/{number}.nii.gz", values)
            save_nifti(tmp_path / f"{name}/masks/{number}.nii.gz", (low > 1).astype(np.uint8))
            say(tmp_path / name, {"thing": 1})
    files = {name: tmp_path / name / "said.json" for name in ("dark", "flat")}
    for name, file in files.items():
        run(inspect_data, data_root=tmp_path / name, json=file)
    dark, flat = (json.loads(file.read_text())["notes"] for file in files.values())
    assert "7 of the 7 files of train" in dark[0] and "nearly black; give --intensity min-max" in dark[0]
    assert "hold one value everywhere" in flat[0]


@pytest.mark.parametrize("top", [1, 255])
def test_ct_that_was_normalised_is_said(tmp_path, top):
    values = np.linspace(0, top, 12 * 12 * 2, dtype=np.float32).reshape(12, 12, 2)
    save_nifti(tmp_path / "a.nii.gz", values)
    scan = decode(tmp_path / "a.nii.gz")
    assert "which are not Hounsfield units; give --intensity percentile" in doubt_about(scan, Reading("auto:ct"))
    assert doubt_about(scan, Reading("auto:percentile")) == ""


def test_an_image_outside_of_its_window_is_said(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", (2000 + 100 * disk()[..., None]).astype(np.int16))
    scan = decode(tmp_path / "a.nii.gz")
    for intensity in ("auto:ct", "window:40,400"):
        assert "99 % outside of their window, -160 to 240" in doubt_about(scan, Reading(intensity))
    assert doubt_about(scan, Reading("window:2050,400")) == doubt_about(scan, Reading("auto:percentile")) == ""
