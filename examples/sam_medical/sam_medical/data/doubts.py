"""Detects files whose images may come out black, white or empty after the intensity mapping."""

from __future__ import annotations

import numpy as np

from sam_medical.data.decoding import Scan
from sam_medical.data.intensity import AIR, AUTO_CT, AUTO_PERCENTILE, bounds_of, is_spread_below_air
from sam_medical.data.offset import NONE, THOUSAND, looks_like_1024
from sam_medical.data.reading import Reading

# Share of values outside the window, above which the window shows almost nothing of a file.
MOST_OUTSIDE = 0.99
# In Hounsfield units. Tissues differ by more than this.
LEAST_RANGE = 20
# Of 255. Screens show lower values as black.
NEARLY_BLACK = 16
DARK = (
    "have eight bits and nothing brighter than 15 of 255, which is nearly black; give --intensity min-max to see them"
)


def doubt_about(scan: Scan, reading: Reading) -> str:
    """Returns the problem and its remedy as the end of a sentence about files; empty for nearly every file.

    Args:
        scan: The scan after its offset was removed.
        reading: How the file is read.
    """
    low, high = scan.finite_range
    if low == high:
        return "hold one value everywhere; check the files"
    bounds = bounds_of(reading.intensity, scan, reading.modality)
    if bounds is None:
        return DARK if scan.is_eight_bit and high < NEARLY_BLACK else ""
    if reading.intensity == AUTO_CT and _is_normalised(scan):
        return (
            f"lie between {low:g} and {high:g}, which are not Hounsfield units; give --intensity percentile:0.5,99.5, "
            "or use the files from before the normalisation"
        )
    outside = min(float(np.mean((scan.sample <= first) | (scan.sample >= last))) for first, last in bounds)
    if outside > MOST_OUTSIDE and reading.intensity.startswith((AUTO_CT, "window")):
        first, last = bounds[0]
        return (
            f"have more than 99 % outside of their window, {first:g} to {last:g}; look at them in a viewer, and "
            "give --offset or another --intensity"
        )
    modality = (reading.modality or scan.modality).upper()
    if reading.intensity == AUTO_PERCENTILE and not modality and low < AIR[0] and _may_be_phases(scan):
        return (
            f"go down to {low:g}, and are read as MRI phase images, since many of them are below air; if they "
            "are CT, give --intensity window:40,400"
        )
    may_be_ct = modality in ("", "CT", "CBCT")
    if reading.intensity == AUTO_PERCENTILE and reading.offset == NONE and may_be_ct and looks_like_1024(scan):
        return f"may be CT with {THOUSAND} added to its values; if they are, give --offset {THOUSAND}"
    return ""


def _may_be_phases(scan: Scan) -> bool:
    return not scan.in_colour and scan.values.dtype == np.int16 and is_spread_below_air(scan)


def _is_normalised(scan: Scan) -> bool:
    """Whether the values look normalised: to 0 to 1, to -1 to 1, to unit variance, or to 0 to 255."""
    low, high = scan.finite_range
    first, last = np.percentile(scan.sample, (0.5, 99.5))
    return bool(last - first < LEAST_RANGE) or (low, high) == (0, 255)
