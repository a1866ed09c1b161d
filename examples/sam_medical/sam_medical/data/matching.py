"""Matches masks to images by name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from sam_medical.data.sources import Source

# Suffixes of mask names, with a number if an image has several masks.
MASK_SUFFIX = re.compile(
    r"[ _.\-]+(masks?|seg|segm|segmentations?|labels?|gt|ground[ _\-]?truth|annotations?|anno|roi)([ _\-]?\d+)?$"
)
# Such as label0001 for img0001, or segmentation-0 for volume-0. The number is optional in a folder per image.
MASK_PREFIX = re.compile(r"^(masks?|seg|segmentations?|labels?|gt|groundtruth|annotations?)([ _.\-]*\d+)?$")
IMAGE_PREFIX = re.compile(r"^(images?|imgs?|volume|vol|scan|imaging|ct|mr|mri)([ _.\-]*\d+)$")
IMAGE_SUFFIX = re.compile(r"[ _.\-]+(image|img|orig|original|scan)$")
# Such as 21_manual1 for 21_training in DRIVE.
MANUAL_SUFFIX, SPLIT_SUFFIX = re.compile(r"_manual\d?$"), re.compile(r"_(training|test|val|validation)$")
CHANNEL = re.compile(r"_(\d{4})$")


def is_mask_name(key: str) -> bool:
    return MASK_SUFFIX.search(key) is not None or MASK_PREFIX.match(key.rpartition("/")[2]) is not None


def match(images: Sequence[Source], masks: Sequence[Source]) -> dict[str, list[Source]]:
    """Matches masks to images: by equal name, by suffix, by number, or as the only ones in a folder.

    Returns:
        The masks of each image that has some, by the image's key.
    """
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
    """Splits a name made of a word and a number. Returns the folder and the digits, or None."""
    folder, _, name = key.rpartition("/")
    found = prefix.match(name)
    return (folder, found[2].strip(" _.-")) if found and found[2] else None


def channels_of(images: Sequence[Source]) -> dict[str, list[Source]]:
    """Groups nnU-Net's files by case. Their names end in the channel number."""
    cases: dict[str, list[Source]] = defaultdict(list)
    for image in images:
        cases[CHANNEL.sub("", image.name)].append(image)
    return dict(cases)


def _by_folder(sources: Sequence[Source]) -> dict[str, list[Source]]:
    folders: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        folders[source.key.rpartition("/")[0]].append(source)
    return folders
