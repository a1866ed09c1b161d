"""The synthetic datasets of the README's commands."""

import pytest

from sam_medical.cli import made_up
from sam_medical.data.opening import open_splits
from sam_medical.data.reading import Reading


@pytest.mark.parametrize(
    "kind, label, images", [("ct", "tumor", 42), ("orientations", "organ", 56), ("small-lesions", "microaneurysm", 7)]
)
def test_what_is_made_up_can_be_trained_on(tmp_path, monkeypatch, kind, label, images, refused):
    monkeypatch.setattr("sys.argv", ["made_up.py", kind, str(tmp_path / "data")])
    made_up.main()
    splits = open_splits("own", str(tmp_path / "data"), reading=Reading("auto"))
    assert list(splits["train"].labels) == [label] and len(splits["train"]) == images
    assert splits["train"][0].masks.any()
    with refused("is there already; give a folder that is not"):
        made_up.main()
