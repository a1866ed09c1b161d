"""What a person should know of a file whose pictures may come out black, white or empty."""

from __future__ import annotations

import numpy as np

from sam_medical.data.decoding import Scan
from sam_medical.data.intensity import AIR, AUTO_CT, AUTO_PERCENTILE, bounds_of, is_spread_below_air
from sam_medical.data.offset import NONE, THOUSAND, looks_like_1024
from sam_medical.data.reading import Reading

# Of the values, beyond which a window shows next to nothing of a file.
MOST_OUTSIDE = 0.99
# Less than tissues differ by in Hounsfield units.
LEAST_RANGE = 20
# Of 255, below which a screen shows black.
NEARLY_BLACK = 16
DARK = (
    "have eight bits and nothing brighter than 15 of 255, which is nearly black; give --intensity min-max to see them"
)


def doubt_about(scan: Scan, reading: Reading) -> str:
    """What is doubtful, as "hold one value everywhere", and what to do; empty for nearly every file.

    Args:
        scan: As it is read, without its offset.
        reading: How.
    """
    low, high = scan.finite_range
    if low == high:
        return "hold one value everywhere; look whether they are what they should be"
    bounds = bounds_of(reading.intensity, scan, reading.modality)
    if bounds is None:
        return DARK if scan.is_eight_bit and high < NEARLY_BLACK else ""
    if reading.intensity == AUTO_CT and _is_normalised(scan):
        return (
            f"lie between {low:g} and {high:g}, which are no Hounsfield units; give --intensity percentile:0.5,99.5, "
            "or the files from before they were normalised"
        )
    outside = min(float(np.mean((scan.sample <= first) | (scan.sample >= last))) for first, last in bounds)
    if outside > MOST_OUTSIDE and reading.intensity.startswith((AUTO_CT, "window")):
        first, last = bounds[0]
        return (
            f"lie by more than 99 % outside of their window, {first:g} to {last:g}; look at them in a viewer, and "
            "give --offset or another --intensity"
        )
    modality = (reading.modality or scan.modality).upper()
    if reading.intensity == AUTO_PERCENTILE and not modality and low < AIR[0] and _may_be_phases(scan):
        return (
            f"go down to {low:g} as CT's may, but spread there as an MRI's phases do, and are taken for that; if they "
            "are CT, give --intensity window:40,400"
        )
    may_be_ct = modality in ("", "CT", "CBCT")
    if reading.intensity == AUTO_PERCENTILE and reading.offset == NONE and may_be_ct and looks_like_1024(scan):
        return f"may be CT with {THOUSAND} added to its values; if they are, give --offset {THOUSAND}"
    return ""


def _may_be_phases(scan: Scan) -> bool:
    return not scan.in_colour and scan.values.dtype == np.int16 and is_spread_below_air(scan)


def _is_normalised(scan: Scan) -> bool:
    """Whether somebody has brought values to 0 to 1, -1 to 1, a deviation of one, or 0 to 255."""
    low, high = scan.finite_range
    first, last = np.percentile(scan.sample, (0.5, 99.5))
    return bool(last - first < LEAST_RANGE) or (low, high) == (0, 255)
