"""Converts the pixels of mask files to one bool mask per label, as an image viewer would show them."""

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
# A black and white mask saved as JPEG has values far above this. A mask of 0 and 1 saved as JPEG does not.
LEAST_WHITE = 64
# Largest difference between the channels of a grey pixel after lossy compression.
MOST_TINT = 32
# Share of a value's pixels between a lower and a higher value, from which on the value is an edge, not a label.
EDGE_SHARE = 0.9
# Share of flat pixels among those between black and white, from which on the values are label numbers.
FLAT_SHARE = 0.1
# Share of the range. A wide blur leaves no gap of this size between values.
LEAST_GAP = 1 / 3
# In pixels: the reach of JPEG artefacts around an edge.
REACH_OF_EDGES = 16
LEAST_GREYS = 32
# Rounding error of integers that were scaled by a header's slope.
ROUNDING = 1e-3
NAMED_AT_MOST = 8


def mask_of_one_label(layer: Layer) -> np.ndarray:
    """Returns the bool mask (H, W) of a single label, thresholded at half of its range.

    Instance numbers (1, 2, 3 ...) are not thresholded: all of them are the label.

    Raises:
        UserError: if the values do not tell which pixels are the label.
    """
    values = _brightness(layer)
    distinct = np.unique(values)
    if not np.isfinite(distinct).all():
        raise UserError(f"{layer.path} holds NaN or infinity; a mask must hold whole numbers.")
    low, high = float(distinct[0]), float(distinct[-1])
    if low < 0:
        raise UserError(
            f"{layer.path} holds {low:g}; a mask must hold zero for background and positive values for labels."
        )
    if len(distinct) == 1:
        return values > (127 if layer.lossy else 0)
    if len(distinct) == 2:
        return values > (low + high) / 2
    if _is_picture(values, distinct):
        raise UserError(
            f"{layer.path} holds {len(distinct)} values, most of them between black and white: an image, and no "
            "mask; use the mask."
        )
    if layer.lossy:
        if high < LEAST_WHITE:
            raise UserError(f"{layer.path} holds 0 to {high:g} in a lossy format; save the mask as PNG.")
        return values > 127
    if _has_soft_edges(values, distinct):
        if _has_numbers(values, distinct):
            some = _abbreviated(distinct[(distinct > low) & (distinct < high)])
            raise UserError(
                f"{layer.path} holds {some} beside {high:g}, and not as soft edges: instance or label numbers. "
                f"Save it with 0 and {high:g}, or put it into masks itself and say in labels.json which values are "
                'the label, {"NAME": [1, 2]}.'
            )
        return values > _whole(high) / 2
    return values > 0


def masks_by_value(layer: Layer, values: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Returns one bool mask per label, (K, H, W), by the values of each label.

    Raises:
        UserError: if the mask contains other values than these and zero.
    """
    known = {0, *(number for numbers in values.values() for number in numbers)}
    candidates = _numbers(layer)
    for numbers in candidates:
        if set(np.unique(numbers).tolist()) <= known:
            if len(known) > 2:
                _warn_of_edges(layer, numbers)
            return np.stack([np.isin(numbers, list(some)) for some in values.values()])
    single_label_mask = _cut_for_one_label(layer, values, candidates)
    if single_label_mask is not None:
        return single_label_mask
    if not candidates:
        raise UserError(
            f"{layer.path} is a mask in colours; save it with one channel, a whole number for each label, or give "
            'labels.json the colours, {"liver": "#ff0000"}.'
        )
    unknown = sorted(set(np.unique(candidates[0]).tolist()) - known)
    some = _abbreviated(unknown)
    known_text = sorted(known)
    if layer.lossy or any(number % 1 for number in unknown):
        raise UserError(
            f"{layer.path} holds {some}, between the labels {known_text}: it was interpolated, or saved in a "
            "lossy format; make it again with nearest-neighbour interpolation, in PNG or NIfTI."
        )
    remedy = f'Say in labels.json what they are, {{"NAME": {unknown[-1]:g}}}, or make' if unknown[-1] > 0 else "Make"
    raise UserError(f"{layer.path} holds {some}, which belong to no label; known are {known_text}. {remedy} them 0.")


def masks_by_colour(layer: Layer, colours: Mapping[str, Colour], background: Sequence[Colour]) -> np.ndarray:
    """Returns one bool mask per label, (K, H, W), by the colour of each label. Black and transparent are background.

    Soft edges are thresholded in the middle if there is a single label.

    Raises:
        UserError: if the mask contains other colours.
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
        raise UserError(
            f"{layer.path} holds {some}{more}, which belong to no label; known are {_colour_list(colours)}."
        )
    distances = ((found[:, None] >> (16, 8, 0) & 255)[:, None] - known) ** 2
    nearest = distances.sum(2).argmin(1)
    if unknown:
        _check_between(layer, found, known, colours)
    return np.stack([(nearest == place)[where].reshape(numbers.shape) for place in range(len(colours))])


def parse_colour(value: object) -> Colour | None:
    """Parses a colour such as "#ff0000", "red" or [255, 0, 0]. Returns None for other values."""
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
    """Raises a `UserError` if a colour is far from the line between black and the colour of the only label."""
    colour = known[0].astype(float)
    pixels = (found[:, None] >> (16, 8, 0) & 255).astype(float)
    along = (pixels @ colour / max(float(colour @ colour), 1.0)).clip(0, 1)
    aside = np.linalg.norm(pixels - along[:, None] * colour, axis=1)
    if aside.max() > (90 if layer.lossy else 24):
        number = int(found[aside.argmax()])
        raise UserError(
            f"{layer.path} holds #{number:06x}, which belongs to no label; known are {_colour_list(colours)}."
        )
    if found.any() and along.max() < 0.5:
        number = int(found[along.argmax()])
        raise UserError(
            f"{layer.path} holds nothing brighter than #{number:06x}, which is not a soft edge of "
            f"{_colour_list(colours)}; give the colours or values that the masks have."
        )


def _colour_list(colours: Mapping[str, Colour]) -> str:
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.values())


def _brightness(layer: Layer) -> np.ndarray:
    """Returns grey values (H, W) of the mask on black, or its alpha channel if only that one varies."""
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
    """Returns the possible integer readings of a mask, the likeliest first; none if the mask is in colour.

    For a colour palette, the stored indices come first. For a grey palette, the displayed values come first.
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
            raise UserError(f"{layer.path} holds NaN or infinity; a mask must hold whole numbers.")
        if layer.alpha is not None:
            values = np.where(layer.alpha > 0, values, values.dtype.type(0))
        found.insert(0 if layer.grey_palette else len(found), values)
    return found


def _begins_with_white(layer: Layer) -> bool:
    """Whether a grey palette displays index 0 brighter than the others, or brighter than black if it is alone."""
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
    """Thresholds a white mask with soft edges if there is a single label. Returns None for other masks."""
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
    """Whether intermediate values are soft edges of one shape, and not label or instance numbers."""
    if values.dtype.kind == "f" and (distinct % 1).any():
        return True
    high = int(distinct[-1])
    if high in (255, 65535):
        return True
    if high < LEAST_WHITE:
        return False
    # A blurred shape may have no flat top. Then each pixel on its slope is between a lower and a higher neighbour.
    slope = (values > 0.1 * high) & (values < 0.9 * high)
    is_between = (ndimage.minimum_filter(values, 3) < values) & (ndimage.maximum_filter(values, 3) > values)
    return len(distinct) > 3 and bool((slope & is_between).sum() >= EDGE_SHARE * slope.sum() > 0)


def _has_numbers(values: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether intermediate values are label or instance numbers: flat, or uniform regions apart from white."""
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
    """Whether the file is an image and not a mask: most pixels are grey, and few of them are in flat regions."""
    if len(distinct) < LEAST_GREYS:
        return False
    low, high = float(distinct[0]), float(distinct[-1])
    grey = (values > low + 0.1 * (high - low)) & (values < high - 0.1 * (high - low))
    flat = grey & (ndimage.minimum_filter(values, 3) == ndimage.maximum_filter(values, 3))
    return bool(grey.mean() > 0.5 and flat.sum() < 0.2 * grey.sum())


def _flat_pixels(values: np.ndarray, where: np.ndarray) -> int:
    """Counts pixels inside flat regions of the commonest values, without regions that are steps of a slope."""
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


def _abbreviated(numbers: Sequence[float] | np.ndarray) -> str:
    more = " and others" if len(numbers) > NAMED_AT_MOST else ""
    return ", ".join(f"{number:g}" for number in numbers[:NAMED_AT_MOST]) + more


def _whole(high: float) -> float:
    """Returns the value of white, given the largest value of a mask."""
    return 1.0 if high <= 1 else high


def _warn_of_edges(layer: Layer, numbers: np.ndarray) -> None:
    """Warns if a label occurs only at edges of a higher label, as interpolated label maps have it."""
    present = np.unique(numbers)
    low = ndimage.minimum_filter(numbers, 3)
    high = ndimage.maximum_filter(numbers, 3)
    for value in present[1:-1]:
        here = numbers == value
        between = here & (low < value) & (high > value)
        if here.sum() >= NAMED_AT_MOST and between.sum() >= EDGE_SHARE * here.sum():
            warnings.warn(
                f"{layer.path}: {value} occurs only at the edges of higher values, as if the mask had been "
                "interpolated; if so, make it again with nearest-neighbour interpolation.",
                stacklevel=2,
            )
            return
