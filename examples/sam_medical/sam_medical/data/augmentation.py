"""Random views of an image, by MONAI."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from monai import transforms
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from sam_medical.data.sides import labels_with_a_side

BOTH = ("images", "masks")
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
