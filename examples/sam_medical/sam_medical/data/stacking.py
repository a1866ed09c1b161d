"""Sorts slices by position, and checks that they form an evenly spaced volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Allowed deviation, as a share of the median slice distance.
UNEVEN = 0.1
SAME_PLACE = 1e-3


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Returns the slice normal from DICOM's ImageOrientationPatient."""
    across = np.array(orientation, dtype=float)
    return np.cross(across[:3], across[3:])


def order_of(places: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Returns the indices that sort positions (N, 3), in millimetres, along the normal."""
    return np.argsort(places @ normal, kind="stable")


def problem_of(places: np.ndarray, normal: np.ndarray, names: Sequence[str]) -> str:
    """Describes why sorted slices are not an evenly spaced volume, to follow "FILE has"; empty if they are.

    Args:
        places: The slice positions (N, 3), in millimetres.
        normal: The slice normal.
        names: The names of the slices.
    """
    steps = np.diff(places, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    if gaps.min() < SAME_PLACE:
        first = int(gaps.argmin())
        return (
            f"two slices at one position, {names[first]} and {names[first + 1]}: time points, echoes or copies; "
            "keep one of them."
        )
    if np.abs(gaps - usual).max() > UNEVEN * usual:
        first = int(np.abs(gaps - usual).argmax())
        return (
            f"slices {usual:g} mm apart, but {names[first]} and {names[first + 1]} are {gaps[first]:g} mm apart; add "
            "the slices that are missing, or save it as an evenly spaced volume."
        )
    aside = np.linalg.norm(steps - gaps[:, None] * normal, axis=1)
    if aside.max() > UNEVEN * usual:
        angle = np.degrees(np.arctan2(aside.max(), usual))
        return (
            f"slices that are not aligned (a gantry tilted by {angle:.0f} degrees); save it as a "
            "rectangular volume, with dcm2niix for example."
        )
    return ""
