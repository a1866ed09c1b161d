"""From a mask's pixels to labels, as its viewers show them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import ImageColor
from scipy import ndimage

from sam_medical.common.errors import UserError
from sam_medical.data.reading import Layer

Colour = tuple[int, int, int]
BACKGROUND_NAMES = ("background", "bg", "_background_")
# What JPEG makes of a mask of black and white reaches far above this; of a mask of 0 and 1 it leaves less.
LEAST_WHITE = 64
# By how much a format that changes values leaves the channels of a grey apart.
MOST_TINT = 32
# Of a value's pixels: where so many lie between a lower and a higher value, it is an edge and no label.
EDGE_SHARE = 0.9
# Of the pixels between black and white: where so many are flat, on no slope between two others, they are numbers.
FLAT_SHARE = 0.1
# Of the range, which a wide blur does not leave out.
LEAST_GAP = 1 / 3
# Pixels, as far as JPEG's blocks and their filters carry what an edge leaves.
REACH_OF_EDGES = 16
LEAST_GREYS = 32
# Of whole numbers that a header's slope has made of other ones.
ROUNDING = 1e-3
NAMED_AT_MOST = 8


def mask_of_one_label(layer: Layer) -> np.ndarray:
    """A mask (H, W) of one label, cut at half of its range.

    Numbers that count things (1, 2, 3 ...) are none of that: all of them are the label.

    Raises:
        UserError: if it is not told what in it is the label.
    """
    values = _brightness(layer)
    distinct = np.unique(values)
    if not np.isfinite(distinct).all():
        raise UserError(f"{layer.path} holds values that are no numbers; a mask must hold whole numbers.")
    low, high = float(distinct[0]), float(distinct[-1])
    if low < 0:
        raise UserError(f"{layer.path} holds {low:g}; a mask holds zero, and above it what is the label.")
    if len(distinct) == 1:
        return values > (127 if layer.lossy else 0)
    if len(distinct) == 2:
        return values > (low + high) / 2
    if _is_picture(values, distinct):
        raise UserError(
            f"{layer.path} holds {len(distinct)} values, most of them between black and white: a picture, and no "
            "mask; put in the mask."
        )
    if layer.lossy:
        if high < LEAST_WHITE:
            raise UserError(f"{layer.path} holds 0 to {high:g} in a format that changes values; save the mask as PNG.")
        return values > 127
    if _has_soft_edges(values, distinct):
        if _has_numbers(values, distinct):
            some = _some(distinct[(distinct > low) & (distinct < high)])
            raise UserError(
                f"{layer.path} holds {some} beside {high:g}, and not as soft edges: numbers of things, or of labels. "
                f"Save it with 0 and {high:g}, or put it into masks itself and say in labels.json which values are "
                'the label, {"NAME": [1, 2]}.'
            )
        return values > _whole(high) / 2
    return values > 0


def masks_by_value(layer: Layer, values: Mapping[str, Sequence[int]]) -> np.ndarray:
    """One mask a label, (K, H, W), by the numbers that belong to it.

    Raises:
        UserError: if there are others than those and zero.
    """
    known = {0, *(number for numbers in values.values() for number in numbers)}
    candidates = _numbers(layer)
    for numbers in candidates:
        if set(np.unique(numbers).tolist()) <= known:
            if len(known) > 2:
                _warn_of_edges(layer, numbers)
            return np.stack([np.isin(numbers, list(some)) for some in values.values()])
    of_one = _cut_for_one_label(layer, values, candidates)
    if of_one is not None:
        return of_one
    if not candidates:
        raise UserError(
            f"{layer.path} is a mask in colours; save it with one channel, a whole number for each label, or give "
            'labels.json the colours, {"liver": "#ff0000"}.'
        )
    unknown = sorted(set(np.unique(candidates[0]).tolist()) - known)
    some = _some(unknown)
    known_text = sorted(known)
    if layer.lossy or any(number % 1 for number in unknown):
        raise UserError(
            f"{layer.path} holds {some}, between the labels {known_text}: it was interpolated, or saved in a "
            "format that changes values; make it anew with nearest neighbours, in PNG or NIfTI."
        )
    remedy = f'Say in labels.json what they are, {{"NAME": {unknown[-1]:g}}}, or make' if unknown[-1] > 0 else "Make"
    raise UserError(f"{layer.path} holds {some}, which belong to no label; known are {known_text}. {remedy} them 0.")


def masks_by_colour(layer: Layer, colours: Mapping[str, Colour], background: Sequence[Colour]) -> np.ndarray:
    """One mask a label, (K, H, W), by its colour; black, and what is transparent, is background.

    Raises:
        UserError: if there are other colours, unless there is but one label, whose soft edges are cut in their middle.
    """
    pixels = layer.values if layer.values.ndim == 3 else np.repeat(layer.values[..., None], 3, axis=2)
    if pixels.dtype != np.uint8:
        raise UserError(f"{layer.path} has no colours of eight bits, but labels.json names colours.")
    if layer.alpha is not None:
        pixels = np.where((layer.alpha > 0)[..., None], pixels, np.uint8(0))
    known = np.array([*colours.values(), (0, 0, 0), *background], dtype=np.int32)
    numbers = pixels.astype(np.int32) @ (1 << 16, 1 << 8, 1)
    known_numbers = known @ (1 << 16, 1 << 8, 1)
    found, where = np.unique(numbers, return_inverse=True)
    unknown = [int(number) for number in found if number not in known_numbers]
    if unknown and len(colours) > 1:
        some = ", ".join(f"#{number:06x}" for number in unknown[:NAMED_AT_MOST])
        more = " and others" if len(unknown) > NAMED_AT_MOST else ""
        raise UserError(f"{layer.path} holds {some}{more}, which belong to no label; known are {_list(colours)}.")
    distances = ((found[:, None] >> (16, 8, 0) & 255)[:, None] - known) ** 2
    nearest = distances.sum(2).argmin(1)
    if unknown:
        _check_between(layer, found, known, colours)
    return np.stack([(nearest == place)[where].reshape(numbers.shape) for place in range(len(colours))])


def parse_colour(value: object) -> Colour | None:
    """A colour from "#ff0000", "red" or [255, 0, 0]; None if it is none."""
    if isinstance(value, str) and not value.isdigit():
        try:
            red, green, blue = ImageColor.getrgb(value)[:3]
        except ValueError:
            return None
        return red, green, blue
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(type(part) is int for part in value):
        return value[0], value[1], value[2]
    return None


def _check_between(layer: Layer, found: np.ndarray, known: np.ndarray, colours: Mapping[str, Colour]) -> None:
    """Raises a UserError if some colour is not near the line from the background to the one label's."""
    colour = known[0].astype(float)
    pixels = (found[:, None] >> (16, 8, 0) & 255).astype(float)
    along = (pixels @ colour / max(float(colour @ colour), 1.0)).clip(0, 1)
    aside = np.linalg.norm(pixels - along[:, None] * colour, axis=1)
    if aside.max() > (90 if layer.lossy else 24):
        number = int(found[aside.argmax()])
        raise UserError(f"{layer.path} holds #{number:06x}, which belongs to no label; known are {_list(colours)}.")
    if found.any() and along.max() < 0.5:
        number = int(found[along.argmax()])
        raise UserError(
            f"{layer.path} holds nothing brighter than #{number:06x}, which is no soft edge of {_list(colours)}; give "
            "the colours or values that the masks have."
        )


def _list(colours: Mapping[str, Colour]) -> str:
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.values())


def _brightness(layer: Layer) -> np.ndarray:
    """Grey values (H, W), as the mask is seen on black; the shape in alpha, where that alone has one."""
    colours = layer.values
    if layer.alpha is not None and layer.alpha.min() < layer.alpha.max():
        if (colours == colours[0, 0]).all():
            return layer.alpha
        is_seen = (layer.alpha / 255)[..., None] if colours.ndim == 3 else layer.alpha / 255
        colours = np.rint(colours * is_seen).astype(colours.dtype)
    if colours.ndim == 2:
        return colours.astype(np.uint8) if colours.dtype == bool else colours
    grey = colours.max(2)
    if (grey == grey[0, 0]).all() and (colours != colours[:1, :1]).any():
        raise UserError(f"{layer.path} is a mask in colours that are equally bright; save it in black and white.")
    return grey


def _numbers(layer: Layer) -> list[np.ndarray]:
    """The ways to take a mask's pixels for numbers, the likeliest first; none if it is in colours.

    The numbers of a palette come first if it is in colours, and what it shows if it is in grey.
    """
    found = []
    if layer.indices is not None and not _begins_with_white(layer):
        found.append(layer.indices)
    values = layer.values
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    elif layer.lossy and values.ndim == 3 and np.ptp(values, axis=2).max() <= MOST_TINT:
        values = np.rint(values.mean(2)).astype(int)
    if values.ndim == 2:
        if values.dtype.kind == "f" and np.isfinite(values).all():
            whole = np.rint(values)
            values = whole.astype(int) if np.abs(values - whole).max() < ROUNDING else values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"{layer.path} holds values that are no numbers; a mask must hold whole numbers.")
        if layer.alpha is not None:
            values = np.where(layer.alpha > 0, values, values.dtype.type(0))
        found.insert(0 if layer.grey_palette else len(found), values)
    return found


def _begins_with_white(layer: Layer) -> bool:
    """Whether a palette in grey shows its first entry brighter than the others, or than black if it is alone."""
    assert layer.indices is not None
    if layer.values.ndim != 3 or (layer.values != layer.values[..., :1]).any():
        return False
    first = layer.values[layer.indices == 0]
    others = layer.values[layer.indices > 0]
    if layer.grey_palette and not others.size:
        return bool(first.max() > 0)
    return bool(first.size and others.size and first.max() > others.max())


def _cut_for_one_label(
    layer: Layer, values: Mapping[str, Sequence[int]], candidates: list[np.ndarray]
) -> np.ndarray | None:
    """The mask of the only label where it is white with soft edges; None where it is anything else."""
    numbers = [number for some in values.values() for number in some]
    if len(numbers) != 1 or numbers[0] < LEAST_WHITE or not candidates:
        return None
    shown = candidates[0 if layer.grey_palette else -1]
    if shown.min() < 0 or shown.max() > numbers[0]:
        return None
    distinct = np.unique(shown)
    if layer.lossy or (_is_white_with_soft_edges(shown, distinct, numbers[0])):
        return (shown > numbers[0] / 2)[None]
    return None


def _is_white_with_soft_edges(values: np.ndarray, distinct: np.ndarray, white: int) -> bool:
    is_soft = distinct[-1] == white and len(distinct) > 2 and _has_soft_edges(values, distinct)
    return bool(is_soft and not _has_numbers(values, distinct))


def _has_soft_edges(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether values between the lowest and the highest are the edges of one shape, and not numbers of things."""
    if values.dtype.kind == "f" and (distinct % 1).any():
        return True
    high = int(distinct[-1])
    if high in (255, 65535):
        return True
    if high < LEAST_WHITE:
        return False
    # A blurred shape may have no flat top, but then each value on its slope lies between a lower and a higher one.
    slope = (values > 0.1 * high) & (values < 0.9 * high)
    is_between = (ndimage.minimum_filter(values, 3) < values) & (ndimage.maximum_filter(values, 3) > values)
    return len(distinct) > 3 and bool((slope & is_between).sum() >= EDGE_SHARE * slope.sum() > 0)


def _has_numbers(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether what lies between black and white is flat, or of one value and apart from white: numbers of things."""
    low, high = distinct[0], distinct[-1]
    inner = (values > low) & (values < high)
    if _flat_pixels(values, inner) > FLAT_SHARE * inner.sum():
        return True
    if np.diff(distinct.astype(float)).max() <= LEAST_GAP * (float(high) - float(low)):
        return False
    apart = inner & (ndimage.distance_transform_cdt(values <= high / 2) > REACH_OF_EDGES)
    parts, count = ndimage.label(apart, np.ones((3, 3)))
    places = range(1, count + 1)
    is_even = np.array(ndimage.minimum(values, parts, places)) == np.array(ndimage.maximum(values, parts, places))
    return bool((is_even & (np.bincount(parts.ravel(), minlength=1)[1:] > 1)).any())


def _is_picture(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether most pixels are grey, and few are like all those around them, as numbers of things would be."""
    if len(distinct) < LEAST_GREYS:
        return False
    low, high = float(distinct[0]), float(distinct[-1])
    grey = (values > low + 0.1 * (high - low)) & (values < high - 0.1 * (high - low))
    flat = grey & (ndimage.minimum_filter(values, 3) == ndimage.maximum_filter(values, 3))
    return bool(grey.mean() > 0.5 and flat.sum() < 0.2 * grey.sum())


def _flat_pixels(values: np.ndarray, where: np.ndarray) -> int:
    """How many pixels lie in the midst of a part of one value, of the commonest, that is no step of a slope."""
    lowest, highest = ndimage.minimum_filter(values, 3), ndimage.maximum_filter(values, 3)
    flat = where & (lowest == highest)
    found, sizes = np.unique(values[flat], return_counts=True)
    cross = ndimage.generate_binary_structure(2, 1)
    lowest, highest = (some(values, footprint=cross) for some in (ndimage.minimum_filter, ndimage.maximum_filter))
    count = 0
    for value in found[np.argsort(-sizes)][:NAMED_AT_MOST]:
        parts, number = ndimage.label(values == value, np.ones((3, 3)))
        places = range(1, number + 1)
        has_lower = np.array(ndimage.minimum(lowest, parts, places)) < value
        has_higher = np.array(ndimage.maximum(highest, parts, places)) > value
        on_slope = np.array([False, *(has_lower & has_higher)])[parts]
        count += int((flat & (parts > 0) & ~on_slope).sum())
    return count


def _some(numbers: Sequence[float] | np.ndarray) -> str:
    more = " and others" if len(numbers) > NAMED_AT_MOST else ""
    return ", ".join(f"{number:g}" for number in numbers[:NAMED_AT_MOST]) + more


def _whole(high: float) -> float:
    """The white that a mask's brightest pixel stands for."""
    return 1.0 if high <= 1 else high


def _warn_of_edges(layer: Layer, numbers: np.ndarray) -> None:
    """Says where a label is but the edge of another, as interpolation leaves it between that and the background."""
    present = np.unique(numbers)
    low = ndimage.minimum_filter(numbers, 3)
    high = ndimage.maximum_filter(numbers, 3)
    for value in present[1:-1]:
        here = numbers == value
        between = here & (low < value) & (high > value)
        if here.sum() >= NAMED_AT_MOST and between.sum() >= EDGE_SHARE * here.sum():
            warnings.warn(
                f"{layer.path}: {value} is nowhere but at the edges of higher values, as if the mask had been "
                "interpolated; if so, make it anew with nearest neighbours.",
                stacklevel=2,
            )
            return
