"""Augmentation: random transforms of an image and its masks, with MONAI."""

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
    """Returns the named transforms. Flips are left out if any label has a side, such as "left kidney".

    "upright" is for scans, which have a fixed top and bottom. "any-orientation" is for histology. "published" is the
    paper authors' augmentation: flips, rotation by up to 10 degrees, brightness and saturation. "none" does nothing.
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
    """Scales the saturation of an image (3, H, W) by a random factor. MONAI has no such transform."""

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
