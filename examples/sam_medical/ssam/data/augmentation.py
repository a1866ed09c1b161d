"""Random views of an image, by MONAI."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from itertools import permutations

from monai import transforms
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

BOTH = ("images", "masks")
# In the languages that labels are seen in, as words of their own.
SIDES = frozenset(
    [
        "left",
        "right",
        "links",
        "rechts",
        "linke",
        "linker",
        "linkes",
        "rechte",
        "rechter",
        "rechtes",
        "gauche",
        "droit",
        "droite",
        "izquierdo",
        "izquierda",
        "derecho",
        "derecha",
        "esquerdo",
        "esquerda",
        "direito",
        "direita",
        "sinistro",
        "sinistra",
        "destro",
        "destra",
        "sinister",
        "dexter",
        "dextra",
        "левый",
        "левая",
        "левое",
        "правый",
        "правая",
        "правое",
        "lewy",
        "lewa",
        "prawy",
        "prawa",
    ]
)
CHINESE_SIDES = ("左", "右")
# In words that are put together of a side and a thing, or of letters; the left one first.
PAIRS = (
    ("l", "r"),
    ("left", "right"),
    ("links", "rechts"),
    ("linke", "rechte"),
    ("gauche", "droite"),
    ("gauche", "droit"),
    ("izq", "der"),
    ("izquierdo", "derecho"),
    ("izquierda", "derecha"),
    ("sin", "dex"),
    ("sx", "dx"),
    ("os", "od"),
)
INTERPOLATION = ("bilinear", "nearest")


def build_augmentation(kind: str, labels: Sequence[str] = ()) -> transforms.Compose:
    """The transforms by name, without mirrored views where labels have a side.

    "upright" is for scans, which have a top and a bottom; "any-orientation" for histology; "published" is what the
    paper's authors use for all: flips, rotation by 10 degrees, brightness and saturation; "none" changes nothing.
    """
    views = AUGMENTATIONS[kind]()
    if labels_with_a_side(labels):
        views = [view for view in views if not isinstance(view, transforms.RandFlipd)]
    return transforms.Compose(views)


def labels_with_a_side(labels: Sequence[str]) -> list[str]:
    """Labels that a mirror makes wrong: those of a left or right, spelt out; and those in pairs of L and R."""
    words = {label: _words(label) for label in labels}
    spelt = {label for label in labels if words[label] & SIDES or any(side in label for side in CHINESE_SIDES)}
    for one, other in permutations(labels, 2):
        if _are_mirrored(words[one], words[other]):
            spelt |= {one, other}
    return [label for label in labels if label in spelt]


def _are_mirrored(words: set[str], others: set[str]) -> bool:
    """Whether two labels differ in one word alone, and there by a left and a right: LK and RK, leftkidney."""
    if len(words - others) != 1 or len(others - words) != 1:
        return False
    (word,), (other,) = words - others, others - words
    for left, right in PAIRS:
        if {word, other} == {left, right}:
            return True
        begin_so = word.startswith(left) and other.startswith(right) and word[len(left) :] == other[len(right) :]
        end_so = word.endswith(left) and other.endswith(right) and word[: -len(left)] == other[: -len(right)]
        if begin_so or end_so:
            return True
    return False


def _words(label: str) -> set[str]:
    """In small letters, also of leftKidney and kidney_L."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", unicodedata.normalize("NFC", label))
    return {word for word in re.split(r"[\W_\d]+", apart.lower()) if word}


def _none() -> list[transforms.Transform]:
    return []


def _upright() -> list[transforms.Transform]:
    return [
        transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=1),
        transforms.RandAffined(
            BOTH,
            prob=0.5,
            rotate_range=math.radians(10),
            scale_range=0.1,
            mode=INTERPOLATION,
            padding_mode="zeros",
        ),
    ]


def _any_orientation() -> list[transforms.Transform]:
    return [
        transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=0),
        transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=1),
        transforms.RandRotate90d(BOTH, prob=0.5),
        transforms.RandAffined(
            BOTH,
            prob=0.3,
            rotate_range=math.radians(20),
            scale_range=0.15,
            mode=INTERPOLATION,
            padding_mode="reflection",
        ),
        RandSaturationd("images", prob=0.5, factors=(0.7, 1.3)),
        transforms.RandScaleIntensityd("images", factors=0.1, prob=0.5, channel_wise=True),
    ]


def _published() -> list[transforms.Transform]:
    return [
        transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=0),
        transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=1),
        transforms.RandRotated(
            BOTH, prob=0.5, range_x=math.radians(10), mode=INTERPOLATION, padding_mode="zeros", keep_size=True
        ),
        transforms.RandScaleIntensityd("images", factors=0.2, prob=0.5),
        RandSaturationd("images", prob=0.5, factors=(0.8, 1.2)),
    ]


class RandSaturationd(RandomizableTransform, MapTransform):
    """Moves colours (3, H, W) towards or away from their gray; MONAI has no transform for it."""

    def __init__(self, keys: str, prob: float, factors: tuple[float, float]) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.factors = factors

    def __call__(self, data: Mapping[Hashable, Tensor]) -> Mapping[Hashable, Tensor]:
        self.randomize(None)
        factor = self.R.uniform(*self.factors)
        if not self._do_transform:
            return data
        changed = dict(data)
        for key in self.key_iterator(changed):
            gray = changed[key].mean(0, keepdim=True)
            changed[key] = (gray + factor * (changed[key] - gray)).clamp(0, 1)
        return changed


AUGMENTATIONS = {
    "upright": _upright,
    "any-orientation": _any_orientation,
    "published": _published,
    "none": _none,
}
