"""The offset of CT values in files without negative values: one offset for all images of a dataset.

A single image without air does not show its offset, but a set of images does. The training images decide, and the
adapter stores the decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from sam_medical.common.choices import OFFSET_FORMS
from sam_medical.common.errors import UserError
from sam_medical.data.decoding import Scan

AUTO, NONE, WRAPPED = "auto", "none", "wrapped"
# The setting of older adapters, which decided image by image.
BY_IMAGE = "by-image"
# Ranges of CT values in unsigned 16-bit files: wrapped negative values, and the highest value.
WRAPPED_FROM = 65536 - 3100
HIGHEST_CT = 20000
HALF, THOUSAND = 32768, 1024
LARGEST = 65536
# Distances below the offset: of the lowest padding, and of the brightest air.
PADDING, AIR = 3100, 900
# For 12-bit CT with 1024 added: the ranges of air and soft tissue, the highest value, and the least shares of both.
AIR_ABOVE_ZERO, TISSUE, HIGHEST_OF_12_BITS = (1, 124), (874, 1324), 4200
LEAST_AIR, LEAST_TISSUE = 0.005, 0.5


def is_offset(text: str) -> bool:
    return text in (AUTO, BY_IMAGE, NONE, WRAPPED) or (text.isdigit() and len(text) <= 5 and 0 < int(text) <= LARGEST)


def check_offset(text: str) -> None:
    """Raises a `UserError` if the text is not one of `OFFSET_FORMS`."""
    if not is_offset(text):
        raise UserError(f"offset is {text!r}, but it must be {OFFSET_FORMS}.")


def settle_offset(scans: Iterable[tuple[Scan, str]]) -> str:
    """Returns the offset of a set of images.

    Args:
        scans: The scans, each with its modality, empty if unknown.

    Raises:
        UserError: if two images show different offsets.
    """
    found: dict[str, Scan] = {}
    for scan, modality in scans:
        offset = offset_seen(scan, modality)
        if offset:
            found.setdefault(offset, scan)
    if len(found) > 1:
        (one, first), (two, second) = list(found.items())[:2]
        raise UserError(
            f"{first.path}: {in_words(one)}, and {second.path}: {in_words(two)}; store all images alike, or give the "
            "--offset of all."
        )
    return next(iter(found), NONE)


def offset_seen(scan: Scan, modality: str = "") -> str:
    """Returns the offset that the values of one image show; empty if they show none."""
    if scan.in_colour or scan.is_eight_bit:
        return ""
    if scan.values.dtype == np.uint16 and (seen := _seen_in_sixteen_bits(scan)):
        return seen
    if (modality or scan.modality).upper() in ("CT", "CBCT") and looks_like_1024(scan):
        return str(THOUSAND)
    return ""


def _seen_in_sixteen_bits(scan: Scan) -> str:
    values = scan.values
    high = values > WRAPPED_FROM
    is_apart = high.mean() > 0.01 and not high.all() and not ((values > HIGHEST_CT) & ~high).any()
    if is_apart and _are_wrapped(values[high]):
        return WRAPPED
    low, top = scan.finite_range
    return str(HALF) if HALF - PADDING <= low <= HALF - AIR and HALF < top <= HALF + HIGHEST_CT else ""


def looks_like_1024(scan: Scan) -> bool:
    """Whether values look like 12-bit CT with 1024 added. MRI may look so by chance, so check the modality as well."""
    low, top = scan.finite_range
    if scan.in_colour or scan.is_eight_bit or low < 0 or not TISSUE[0] < top <= HIGHEST_OF_12_BITS:
        return False
    sample = scan.sample
    air = (sample >= AIR_ABOVE_ZERO[0]) & (sample <= AIR_ABOVE_ZERO[1])
    inside = sample[sample > sum(AIR_ABOVE_ZERO)]
    is_tissue = (inside > TISSUE[0]) & (inside < TISSUE[1])
    return bool(air.mean() >= LEAST_AIR and is_tissue.mean() >= LEAST_TISSUE)


def without_offset(scan: Scan, offset: str) -> Scan:
    """Returns the scan in Hounsfield units if it can have this offset; otherwise the scan unchanged."""
    if offset in (AUTO, BY_IMAGE):
        is_picture = scan.affine is None and scan.values.dtype == np.uint16
        seen = _seen_in_sixteen_bits(scan) if is_picture and not scan.in_colour else ""
        return without_offset(scan, seen or NONE)
    if offset == WRAPPED and scan.values.dtype == np.uint16 and not scan.in_colour:
        return replace(scan, values=scan.values.view(np.int16), remark="with its negative values, which were wrapped")
    if offset.isdigit() and _can_have(scan, int(offset)):
        kind = np.float32 if scan.values.dtype.kind == "f" else np.int32
        return replace(
            scan, values=scan.values.astype(kind) - kind(offset), remark=f"less the {offset} that were added"
        )
    return scan


def _can_have(scan: Scan, added: int) -> bool:
    """Whether a scan can have this offset: no value is negative, and only padding is far below the offset."""
    return not (scan.in_colour or scan.is_eight_bit) and scan.finite_range[0] >= max(0, added - PADDING)


def _are_wrapped(values: np.ndarray) -> bool:
    """Whether values vary as tissue does, or equal wrapped air or padding. White markers in an image do neither."""
    return bool(np.ptp(values) > 10 or -PADDING <= int(values.view(np.int16)[0]) <= -AIR)


def in_words(offset: str) -> str:
    return "values below zero were wrapped" if offset == WRAPPED else f"{offset} was added to its values"
