"""COCO and labelme annotations find the image that they name, also after files were moved."""

import json

import numpy as np
import pytest
from test_real_files import open_own, save, say

from sam_medical.common.errors import UserError
from sam_medical.data.annotations import _draw

GREY = {"a": 40, "b": 200}


def save_images(root, folder, grey=90, count=10):
    for index in range(count):
        save(root / folder / f"{index}.png", np.full((48, 64), grey, np.uint8))


def write_coco(root, *names):
    images = [{"id": place, "file_name": name, "width": 64, "height": 48} for place, name in enumerate(names)]
    outlines = [
        {"id": place, "image_id": place, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
        for place in range(len(names))
    ]
    say(root, {"images": images, "annotations": outlines, "categories": [{"id": 1, "name": "cyst"}]}, "coco.json")


def write_labelme(root, folder, count=10, picture="{}.png"):
    shape = {"label": "cyst", "shape_type": "polygon", "points": [[14, 10], [34, 10], [34, 30]]}
    for index in range(count):
        content = {"imagePath": picture.format(index), "imageWidth": 64, "imageHeight": 48, "shapes": [shape]}
        say(root / folder, content, f"{index}.json")


class TestCoco:
    def test_a_picture_of_another_folder_is_not_taken(self, tmp_path):
        save_images(tmp_path, "images/b")
        write_coco(tmp_path, *(f"a/{index}.png" for index in range(10)))
        with pytest.raises(UserError, match=r"lists a/0\.png, which is in no folder"):
            open_own(tmp_path)

    @pytest.mark.parametrize("prefix", ["", "images/", "./images/", "/elsewhere/images/", "C:\\data\\images\\"])
    def test_names_are_ends_of_paths(self, tmp_path, prefix):
        for folder, grey in GREY.items():
            save_images(tmp_path, f"images/{folder}", grey, 5)
        write_coco(tmp_path, *(f"{prefix}{folder}/{index}.png" for folder in GREY for index in range(5)))
        dataset = open_own(tmp_path)
        assert [dataset[index].name.split("_")[0] for index in (0, 6)] == ["a", "b"]
        assert [round(dataset[index].image.mean() * 255) for index in (0, 6)] == [40, 200]

    def test_a_name_without_a_folder_may_lie_in_any(self, tmp_path):
        save_images(tmp_path, "images/b")
        write_coco(tmp_path, *(f"{index}.png" for index in range(10)))
        assert len(open_own(tmp_path)) == 7

    def test_one_file_for_folders_of_splits(self, tmp_path):
        names = [f"{split}/{index}.png" for split in ("train", "val", "test") for index in range(2)]
        for split in ("train", "val", "test"):
            save_images(tmp_path, f"images/{split}", 40 * len(split), 2)
        write_coco(tmp_path, *names)
        assert open_own(tmp_path, "validation")[1].image.mean() == pytest.approx(120 / 255)


class TestLabelme:
    def test_a_picture_of_another_folder_is_not_taken(self, tmp_path):
        save_images(tmp_path, "b")
        write_labelme(tmp_path, "a")
        with pytest.raises(UserError, match=r"0\.json is of 0\.png, which lies neither beside it nor .*put it beside"):
            open_own(tmp_path)

    @pytest.mark.parametrize(
        ("images", "jsons", "picture"),
        [
            ("images", "labels", "{}.png"),
            ("images/s1", "annotations/s1", "/elsewhere/{}.png"),
            ("pictures", "shapes", "..\\pictures\\{}.png"),
            ("images", "", "{}.jpg"),
        ],
    )
    def test_a_picture_may_lie_at_the_like_place(self, tmp_path, images, jsons, picture):
        save_images(tmp_path, images)
        write_labelme(tmp_path, jsons, picture=picture)
        assert len(open_own(tmp_path)) == 7

    def test_a_rectangle_may_have_four_corners_and_be_turned(self, tmp_path):
        corners = [[14, 10], [35, 10], [35, 31], [14, 31]]
        expected = np.zeros((48, 64), bool)
        expected[10:32, 14:36] = True
        for points in (corners, [corners[0], corners[2]]):
            shape = {"shape_type": "rectangle", "points": points}
            np.testing.assert_array_equal(_draw(shape, (48, 64), tmp_path), expected)
        turned = {"shape_type": "rotation", "points": [[24, 10], [34, 20], [24, 30], [14, 20]]}
        assert _draw(turned, (48, 64), tmp_path).sum() == pytest.approx(2 * 10 * 10 + 20, abs=3)


class TestSplitsBelowImages:
    """As in mmsegmentation's data and ADE20K's."""

    def write(self, root, images="images", masks="masks/{}", label=1):
        for split in ("train", "val", "test"):
            for index in range(2):
                save(root / images / split / f"{index}.png", np.full((48, 64), 40 * len(split), np.uint8))
                mask = np.zeros((48, 64), np.uint8)
                mask[: len(split)] = label
                save(root / masks.format(split) / f"{index}.png", mask)

    @pytest.mark.parametrize("folders", [("images", "masks/{}"), ("img_dir", "ann_dir/{}")])
    def test_label_maps(self, tmp_path, folders):
        self.write(tmp_path, *folders)
        say(tmp_path, {"cyst": 1})
        self.check(tmp_path)

    @pytest.mark.parametrize("masks", ["masks/{}/cyst", "masks/cyst/{}"])
    def test_folders_of_labels_inside_and_outside(self, tmp_path, masks):
        self.write(tmp_path, masks=masks, label=255)
        self.check(tmp_path)

    def check(self, root):
        for split, length in {"train": 5, "validation": 3, "test": 4}.items():
            dataset = open_own(root, split)
            assert (list(dataset.labels), [dataset[index].name for index in range(2)]) == (["cyst"], ["0", "1"])
            assert len(dataset) == 2 and dataset[1].masks.sum() == 64 * length
            assert dataset[1].image.mean() == pytest.approx(40 * length / 255, abs=1e-3)

    def test_what_lies_beside_or_is_missing_is_named(self, tmp_path):
        self.write(tmp_path)
        with pytest.raises(UserError, match=r"the labels of .*masks are unknown"):
            open_own(tmp_path)
        (tmp_path / "labels.json").write_text(json.dumps({"cyst": 1}))
        for folder in ("images", "masks"):
            save(tmp_path / folder / "more/9.png", np.zeros((48, 64), np.uint8))
        with pytest.raises(UserError, match=r"9\.png lies in none of the folders of splits, test, train, val; move"):
            open_own(tmp_path)
