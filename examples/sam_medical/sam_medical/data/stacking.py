"""Whether slices that say where they are make an even volume, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Of the usual distance of two slices.
UNEVEN = 0.1
SAME_PLACE = 1e-3


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """The direction across slices, from DICOM's directions of rows and columns."""
    across = np.array(orientation, dtype=float)
    return np.cross(across[:3], across[3:])


def order_of(places: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Of places (N, 3), from one end to the other."""
    return np.argsort(places @ normal, kind="stable")


def problem_of(places: np.ndarray, normal: np.ndarray, names: Sequence[str]) -> str:
    """Why slices in their order are no even volume, after the words "FILE has"; empty if they are one."""
    steps = np.diff(places, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    if gaps.min() < SAME_PLACE:
        first = int(gaps.argmin())
        return (
            f"two slices in one place, {names[first]} and {names[first + 1]}: several time points, echoes or copies; "
            "keep one of them."
        )
    if np.abs(gaps - usual).max() > UNEVEN * usual:
        first = int(np.abs(gaps - usual).argmax())
        return (
            f"slices {usual:g} mm apart, but {names[first]} and {names[first + 1]} are {gaps[first]:g} mm apart; add "
            "the slices that are missing, or save it as an even volume."
        )
    aside = np.linalg.norm(steps - gaps[:, None] * normal, axis=1)
    if aside.max() > UNEVEN * usual:
        angle = np.degrees(np.arctan2(aside.max(), usual))
        return (
            f"slices that do not lie straight above each other (a gantry tilted by {angle:.0f} degrees); save it as a "
            "straight volume, with dcm2niix for example."
        )
    return ""
