"""Masks whose stored values differ from the displayed ones: palettes, few bits, white as zero."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from sam_medical.common.errors import UserError
from sam_medical.data.decoding import decode
from sam_medical.data.label_names import LabelNames
from sam_medical.data.masks import mask_of_one_label, masks_by_value
from sam_medical.data.reading import Reading, read_layer
from sam_medical.data.sources import source_of_file

y, x = np.mgrid[:48, :64]
DISK = (y - 20) ** 2 + (x - 24) ** 2 < 100


def layer_of(path):
    source = source_of_file(path)
    return read_layer(source, source, None, Reading("auto"))


def masks_of(path, **values):
    names = LabelNames({name: (value,) for name, value in values.items()})
    return dict(zip(values, masks_by_value(layer_of(path), names.values), strict=True))


def save_with_palette(path, indices, *colours):
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([part for colour in colours for part in colour])
    image.save(path)


class TestPalettes:
    @pytest.mark.parametrize("ending", ["gif", "png"])
    def test_a_grey_palette_that_leaves_out_what_is_not_used_shows_the_labels(self, tmp_path, ending):
        path = tmp_path / f"mask.{ending}"
        if ending == "gif":
            Image.fromarray((DISK * 2).astype(np.uint8)).save(path)
        else:
            save_with_palette(path, DISK, (0, 0, 0), (2, 2, 2))
        masks = masks_of(path, a=1, b=2)
        assert not masks["a"].any()
        assert np.array_equal(masks["b"], DISK)

    def test_a_grey_palette_that_only_makes_numbers_visible_holds_the_numbers(self, tmp_path):
        save_with_palette(tmp_path / "mask.png", DISK * 2, (0, 0, 0), (127,) * 3, (255,) * 3)
        assert np.array_equal(masks_of(tmp_path / "mask.png", a=1, b=2)["b"], DISK)

    def test_the_numbers_of_a_palette_in_colours_are_labels_though_those_used_are_grey(self, tmp_path):
        """VOC's seventh colour is a grey of 128."""
        save_with_palette(tmp_path / "mask.png", DISK * 2, (0, 0, 0), (128, 0, 0), (128, 128, 128))
        masks = masks_of(tmp_path / "mask.png", a=2, b=128)
        assert np.array_equal(masks["a"], DISK)
        assert not masks["b"].any()

    def test_a_mask_that_is_white_all_over_is_all_label(self, tmp_path):
        save_with_palette(tmp_path / "mask.png", DISK * 0, (255, 255, 255))
        assert masks_of(tmp_path / "mask.png", lesion=255)["lesion"].all()
        assert mask_of_one_label(layer_of(tmp_path / "mask.png")).all()
        with pytest.raises(UserError, match="holds 255"):
            masks_of(tmp_path / "mask.png", lesion=1)


class TestTiff:
    @pytest.mark.parametrize("pages", [1, 3])
    def test_one_bit_of_which_zero_is_white(self, tmp_path, pages):
        with tifffile.TiffWriter(tmp_path / "mask.tif") as file:
            for _ in range(pages):
                file.write(~DISK, photometric="miniswhite")
        assert np.array_equal(mask_of_one_label(layer_of(tmp_path / "mask.tif")), DISK)
        assert np.array_equal(masks_of(tmp_path / "mask.tif", lesion=255)["lesion"], DISK)

    @pytest.mark.parametrize("pages", [1, 3])
    @pytest.mark.parametrize("white_is_zero", [False, True])
    def test_four_bits_are_scaled_alike_in_a_picture_and_in_a_stack(self, tmp_path, pages, white_is_zero):
        numbers = (DISK * 2).astype(np.uint8)
        write_four_bits(tmp_path / "mask.tif", 15 - numbers if white_is_zero else numbers, pages, white_is_zero)
        scan = decode(tmp_path / "mask.tif")
        assert np.array_equal(scan.values, np.stack([numbers * 17] * pages))
        assert np.array_equal(masks_of(tmp_path / "mask.tif", a=1, b=2)["b"], DISK)
        assert np.array_equal(mask_of_one_label(layer_of(tmp_path / "mask.tif")), DISK)

    def test_signed_numbers_of_eight_bits_keep_their_sign(self, tmp_path):
        tifffile.imwrite(tmp_path / "image.tif", (DISK * 150.0 - 88).astype(np.int8))
        assert decode(tmp_path / "image.tif").finite_range == (-88, 62)


def write_four_bits(path, numbers, pages, white_is_zero):
    """As tifffile does not: the standard's tags, and two pixels a byte."""
    packed = ((numbers[:, ::2] << 4) | numbers[:, 1::2]).tobytes()
    tags = {256: 64, 257: 48, 258: 4, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: 48, 279: len(packed)}
    content = b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + packed
    for page in range(pages):
        entries = [
            tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + int(value).to_bytes(4, "little")
            for tag, value in tags.items()
        ]
        after = len(content) + 2 + 12 * len(entries) + 4
        following = after if page + 1 < pages else 0
        content += len(entries).to_bytes(2, "little") + b"".join(entries) + following.to_bytes(4, "little")
    path.write_bytes(content)
