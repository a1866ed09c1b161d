"""Confidence intervals and tests of Dice scores, with scipy.

The unit is an independent case: a patient, volume or video if the dataset has such groups, otherwise an image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sam_medical.common.errors import UserError
from sam_medical.evaluation.metrics import MaskScore

RESAMPLES = 9999
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods' Dice.

    Attributes:
        difference: Mean over images of the first method's Dice minus the other's.
        low: Lower end of the bootstrap interval of the difference; None for a single case.
        high: Upper end of the interval; None for a single case.
        p_value: The p value of a two-sided paired permutation test of the mean difference; 1 for a single case.
        cases: Number of cases.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float
    cases: int


@dataclass(frozen=True)
class Case:
    """A patient, volume, video or image: the unit of resampling and permutation.

    Attributes:
        total: The sum over its images of Dice, or of differences of Dice.
        images: Number of its images.
    """

    total: float
    images: int


def dice_by_case(scores: Iterable[MaskScore]) -> dict[str, Case]:
    """Groups scores into cases, by name. The Dice of an image is the mean over its labels and runs."""
    values: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        values[score.group or score.image][score.image].append(score.dice)
    return {
        name: Case(sum(float(np.mean(dice)) for dice in images.values()), len(images))
        for name, images in values.items()
    }


def interval(cases: Collection[Case]) -> tuple[float, float] | None:
    """Returns the 95 % bootstrap interval of the mean over images, with a fixed seed; None for a single case."""
    if len(cases) < 2:
        return None
    totals, images = np.array([case.total for case in cases]), np.array([case.images for case in cases])
    means = totals / images
    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    result = stats.bootstrap(
        (totals, images),
        _mean_over_images,
        paired=True,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare(scores: Sequence[MaskScore], other: Sequence[MaskScore]) -> Comparison:
    """Compares one method's scores with another's on the same cases.

    Raises:
        UserError: if the two differ in images or labels.
    """
    mine, theirs = ({(score.image, score.label) for score in evaluation} for evaluation in (scores, other))
    if mine != theirs:
        image, label = sorted(mine ^ theirs)[0]
        raise UserError(
            f"the two evaluations are not of the same images and labels: only one has {label!r} in {image}; evaluate "
            "both on the same split."
        )
    first, second = dice_by_case(scores), dice_by_case(other)
    differences = [Case(case.total - second[name].total, case.images) for name, case in first.items()]
    totals, bounds = np.array([case.total for case in differences]), interval(differences)
    difference = float(totals.sum() / sum(case.images for case in differences))
    if bounds is None:
        return Comparison(difference, None, None, 1.0, len(differences))
    # The number of images is constant, so permuting sums is the same as permuting means.
    test = stats.permutation_test(
        (totals,),
        np.sum,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        random_state=np.random.default_rng(0),
    )
    return Comparison(difference, *bounds, float(test.pvalue), len(differences))


def _mean_over_images(totals: np.ndarray, images: np.ndarray, axis: int) -> np.ndarray:
    return totals.sum(axis=axis) / images.sum(axis=axis)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for multiple tests by Holm's step-down method."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted
