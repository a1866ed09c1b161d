"""Intensity mapping: from the values of a file to the model's three input channels between zero and one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sam_medical.common.choices import INTENSITY_FORMS
from sam_medical.common.errors import UserError
from sam_medical.data.decoding import Scan

# Centre and width, in Hounsfield units.
WINDOWS = {
    "soft-tissue": (40.0, 400.0),
    "abdomen": (40.0, 400.0),
    "mediastinum": (50.0, 350.0),
    "liver": (60.0, 160.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "subdural": (75.0, 215.0),
    "stroke": (40.0, 40.0),
    "angio": (300.0, 600.0),
}
SOFT_TISSUE = WINDOWS["soft-tissue"]
ROBUST = (0.5, 99.5)
AUTO, AUTO_CT, AUTO_PERCENTILE = "auto", "auto:ct", "auto:percentile"
# The mapping of adapters that are older than the choice of a mapping.
LEGACY = "legacy"
# Hounsfield units of air, which no tissue and no other modality's background has; and of padding below it.
AIR = (-1100.0, -900.0)
PADDING = -1500.0
LEAST_AIR = 0.005
# The number of distinct padding values, and the share of the remaining values that may be below air.
MOST_PADDINGS, MOST_BELOW_AIR = 3, 0.15
# Share of voxels from which on the lowest value, or zero, counts as background.
LEAST_BACKGROUND = 0.01


@dataclass(frozen=True)
class Intensity:
    """An intensity mapping.

    Attributes:
        kind: The mapping, such as "window" or "percentile".
        pairs: One (centre, width) pair per window, in the file's units; or one pair of percentiles.
    """

    kind: str
    pairs: tuple[tuple[float, float], ...] = ()


def parse_intensity(text: str) -> Intensity:
    """Parses the option ``intensity``.

    Raises:
        UserError: if the text is not one of `INTENSITY_FORMS`.
    """
    kind, _, rest = text.strip().lower().partition(":")
    if text in (AUTO, AUTO_CT, AUTO_PERCENTILE, LEGACY, "min-max", "eight-bit"):
        return Intensity(text)
    if kind == "window":
        windows = _windows(rest.replace("window:", ""))
        if len(windows) in (1, 3) and all(width > 0 for _, width in windows):
            return Intensity(kind, windows)
    if kind == "percentile":
        low, high = (_numbers(rest) or [0, 0])[:2] if len(_numbers(rest)) == 2 else (0, 0)
        if 0 <= low < high <= 100:
            return Intensity(kind, ((low, high),))
    known = ", ".join(WINDOWS)
    raise UserError(f"intensity is {text!r}, but it must be {INTENSITY_FORMS}; the windows with a name are {known}.")


def is_intensity(text: str) -> bool:
    try:
        parse_intensity(text)
    except UserError:
        return False
    return True


def _windows(text: str) -> tuple[tuple[float, float], ...]:
    """Parses pairs of centre and width, given as numbers or by name. Returns nothing if a word is neither."""
    words = [word for word in re.split(r"[\s,;/|+]+", text) if word]
    windows: list[tuple[float, float]] = []
    numbers: list[float] = []
    for word in words:
        if word in WINDOWS and not numbers:
            windows.append(WINDOWS[word])
            continue
        number = _numbers(word)
        if not number:
            return ()
        numbers += number
        if len(numbers) == 2:
            windows.append((numbers[0], numbers[1]))
            numbers = []
    return () if numbers else tuple(windows)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        return []


def is_ct(scan: Scan, modality: str = "") -> bool:
    """Whether a scan is CT, by its modality or, if that is unknown, by its values.

    Hounsfield units show air near -1000, or padding far below it.
    """
    stated = modality or scan.modality
    if stated:
        return stated.upper() in ("CT", "CBCT")
    if scan.in_colour or scan.values.dtype.kind not in "if" or scan.values.dtype == np.int8:
        return False
    low, high = scan.finite_range
    if not -33000 <= low <= -900 or high > 33000:
        return False
    sample = scan.sample
    if is_spread_below_air(scan):
        return False
    air = ((sample > AIR[0]) & (sample < AIR[1])) | (sample <= PADDING)
    is_tissue = (sample > -200) & (sample < 2000)
    return bool(air.mean() >= LEAST_AIR and is_tissue.any() and np.ptp(sample[is_tissue]) > 10)


def is_spread_below_air(scan: Scan) -> bool:
    """Whether many distinct values are below air, as in MRI phase images. A CT scanner's padding has a few values."""
    sample = scan.sample
    below = sample[sample < AIR[0]]
    _, counts = np.unique(below, return_counts=True)
    padding = np.sort(counts)[-MOST_PADDINGS:].sum()
    return bool(below.size - padding > MOST_BELOW_AIR * (sample.size - padding))


def settle(intensity: str, scans: Iterable[tuple[Scan, str]]) -> str:
    """Resolves ``auto`` by a majority vote of the training images, so that all later images are read the same way.

    8-bit images do not vote, and their values are kept.

    Args:
        intensity: The option's value. Anything but ``auto`` is returned unchanged.
        scans: Training scans, each with its modality, empty if unknown.
    """
    if intensity != AUTO:
        return intensity
    votes = [is_ct(scan, modality) for scan, modality in scans if not scan.is_eight_bit]
    if not votes:
        return AUTO
    return AUTO_CT if 2 * sum(votes) > len(votes) else AUTO_PERCENTILE


def describe(intensity: str, scan: Scan, modality: str = "") -> tuple[list[tuple[float, float]], str]:
    """Describes the mapping of a file: the (zero, one) values per window, and the reason in words."""
    bounds = bounds_of(intensity, scan, modality)
    if bounds is None:
        return [(0.0, 255.0)], "eight bits, as they are"
    if not intensity.startswith(AUTO):
        return bounds, intensity
    if intensity == AUTO_CT or (intensity == AUTO and is_ct(scan, modality)):
        reason = "its modality" if modality or scan.modality else "its values"
        return bounds, f"the soft-tissue window, {bounds[0][0]:g} to {bounds[0][1]:g}: CT by {reason}"
    return bounds, "percentiles of the foreground"


def bounds_of(intensity: str, scan: Scan, modality: str = "") -> list[tuple[float, float]] | None:
    """Returns the values mapped to zero and to one, one pair per window; None if 8-bit values are kept."""
    return _bounds(parse_intensity(intensity), scan, modality)


def to_channels(plane: np.ndarray, scan: Scan, intensity: Intensity, modality: str = "") -> np.ndarray:
    """Maps a plane of a scan, (H, W) or (H, W, 3), to (H, W, 3), float32 between zero and one."""
    bounds = _bounds(intensity, scan, modality)
    if bounds is None:
        grey = plane.astype(np.float32) / 255
        return np.ascontiguousarray(grey.clip(0, 1) if plane.ndim == 3 else _as_three_channels([grey.clip(0, 1)]))
    lowest = scan.finite_range[0]
    values = plane.astype(np.float32)
    if plane.dtype.kind == "f":
        values = np.nan_to_num(values, nan=lowest, posinf=scan.finite_range[1], neginf=lowest)
    channels = [((values - low) / max(high - low, 1e-8)).clip(0, 1) for low, high in bounds]
    return np.ascontiguousarray(channels[0]) if plane.ndim == 3 else _as_three_channels(channels)


def _as_three_channels(channels: list[np.ndarray]) -> np.ndarray:
    return np.stack(channels * (3 // len(channels)), axis=-1)


def _bounds(intensity: Intensity, scan: Scan, modality: str) -> list[tuple[float, float]] | None:
    """Returns the values mapped to zero and to one, one pair per window; None if 8-bit values are kept."""
    kind = intensity.kind
    if kind == "eight-bit":
        return None
    if kind == LEGACY:
        return None if scan.is_eight_bit and scan.affine is None else [scan.finite_range]
    if kind.startswith(AUTO) and scan.is_eight_bit:
        return None
    if kind == "min-max":
        return [scan.finite_range]
    if kind == "window":
        return [(centre - width / 2, centre + width / 2) for centre, width in intensity.pairs]
    if kind == AUTO_CT or (kind == AUTO and is_ct(scan, modality)):
        centre, width = SOFT_TISSUE
        return [(centre - width / 2, centre + width / 2)]
    percents = intensity.pairs[0] if intensity.pairs else ROBUST
    return [_cached_percentiles(scan, percents)]


def _cached_percentiles(scan: Scan, percents: tuple[float, float]) -> tuple[float, float]:
    known = scan.__dict__.setdefault("percentiles", {})
    if percents not in known:
        known[percents] = robust_range(scan.sample, percents)
    return known[percents]


def robust_range(values: np.ndarray, percents: tuple[float, float] = ROBUST) -> tuple[float, float]:
    """Returns two percentiles of the foreground.

    The lowest value and zero are background if many voxels have them. The background is mapped to zero. It becomes the
    lower bound only if it is close to the foreground: distant padding would take up more than half of the range.
    """
    low = values.min()
    backgrounds = [b for b in {float(low), 0.0} if np.mean(values == b) >= LEAST_BACKGROUND]
    inside = values[~np.isin(values, backgrounds)]
    if not inside.size:
        return float(low), float(values.max())
    first, last = (float(bound) for bound in np.percentile(inside, percents))
    near = [b for b in backgrounds if b < first and (last <= first or first - b <= last - first)]
    first = min([first, *near])
    return (first, last) if last > first else (float(low), float(values.max()))
