"""Which masks belong to which image, by their names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from sam_medical.data.sources import Source

# What people add to an image's name to name its masks, and a number where it has several.
MASK_SUFFIX = re.compile(
    r"[ _.\-]+(masks?|seg|segm|segmentations?|labels?|gt|ground[ _\-]?truth|annotations?|anno|roi)([ _\-]?\d+)?$"
)
# As in label0001 of img0001, or segmentation-0 of volume-0; and alone, in a folder of its own.
MASK_PREFIX = re.compile(r"^(masks?|seg|segmentations?|labels?|gt|groundtruth|annotations?)([ _.\-]*\d+)?$")
IMAGE_PREFIX = re.compile(r"^(images?|imgs?|volume|vol|scan|imaging|ct|mr|mri)([ _.\-]*\d+)$")
IMAGE_SUFFIX = re.compile(r"[ _.\-]+(image|img|orig|original|scan)$")
# As in 21_manual1 of 21_training, which DRIVE has.
MANUAL_SUFFIX, SPLIT_SUFFIX = re.compile(r"_manual\d?$"), re.compile(r"_(training|test|val|validation)$")
CHANNEL = re.compile(r"_(\d{4})$")


def is_mask_name(key: str) -> bool:
    return MASK_SUFFIX.search(key) is not None or MASK_PREFIX.match(key.rpartition("/")[2]) is not None


def match(images: Sequence[Source], masks: Sequence[Source]) -> dict[str, list[Source]]:
    """The masks of each image, by its key: of its name, with a suffix, of its number, or alone in its folder."""
    exact = {mask.key: mask for mask in masks}
    by_stem: dict[str, list[Source]] = defaultdict(list)
    for mask in masks:
        if is_mask_name(mask.key):
            by_stem[MASK_SUFFIX.sub("", mask.key)].append(mask)
    by_number = {number: mask for mask in masks if (number := _number(mask.key, MASK_PREFIX))}
    by_manual = {MANUAL_SUFFIX.sub("", mask.key): mask for mask in masks if MANUAL_SUFFIX.search(mask.key)}
    images_in, masks_in = _by_folder(images), _by_folder(masks)
    places = Counter(image.key.rsplit("/", 1)[0] for image in images if "/" in image.key)
    found = {}
    for image in images:
        stem = IMAGE_SUFFIX.sub("", image.key)
        folder = image.key.rpartition("/")[0]
        if image.key in exact:
            found[image.key] = [exact[image.key]]
        elif by_stem.get(image.key) or by_stem.get(stem):
            found[image.key] = by_stem.get(image.key) or by_stem[stem]
        elif stem in exact:
            found[image.key] = [exact[stem]]
        elif (number := _number(image.key, IMAGE_PREFIX)) in by_number:
            found[image.key] = [by_number[number]]
        elif (manual := SPLIT_SUFFIX.sub("", image.key)) in by_manual:
            found[image.key] = [by_manual[manual]]
        elif folder and len(images_in[folder]) == 1 and len(masks_in[folder]) == 1:
            found[image.key] = masks_in[folder]
        elif folder in exact and places[folder] == 1:
            found[image.key] = [exact[folder]]
    return found


def _number(key: str, prefix: re.Pattern[str]) -> tuple[str, str] | None:
    """The folder and the digits of a name that is a word and a number."""
    folder, _, name = key.rpartition("/")
    found = prefix.match(name)
    return (folder, found[2].strip(" _.-")) if found and found[2] else None


def channels_of(images: Sequence[Source]) -> dict[str, list[Source]]:
    """nnU-Net's files of each case, whose names end in the number of a channel."""
    cases: dict[str, list[Source]] = defaultdict(list)
    for image in images:
        cases[CHANNEL.sub("", image.name)].append(image)
    return dict(cases)


def _by_folder(sources: Sequence[Source]) -> dict[str, list[Source]]:
    folders: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        folders[source.key.rpartition("/")[0]].append(source)
    return folders
