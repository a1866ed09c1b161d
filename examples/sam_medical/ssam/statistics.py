"""How sure a score is, and whether one method is better than another: by scipy, over what is independent.

That is patients, volumes or videos where the dataset tells them apart, and otherwise images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ssam.errors import UserError
from ssam.metrics import MaskScore

RESAMPLES = 9999
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Of one method's Dice with another's, case by case.

    Attributes:
        difference: Mean over cases of the first's Dice less the other's.
        low, high: Bootstrap interval of the difference; None for a single case.
        p_value: Of a two-sided paired permutation test of the mean difference; 1 for a single case.
        cases: How many both have.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float
    cases: int


def dice_by_case(scores: Iterable[MaskScore]) -> dict[str, float]:
    """Each case's Dice: the mean over its images of what an image has over its labels, and over runs where there are
    several."""
    values = defaultdict(list)
    for score in scores:
        values[score.group or score.image].append(score.dice)
    return {case: float(np.mean(dice)) for case, dice in values.items()}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a mean, the same from one call to the next; None for a single value."""
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare(scores: Sequence[MaskScore], other: Sequence[MaskScore]) -> Comparison:
    """One method's scores with another's on the same cases.

    Raises:
        UserError: if they are not of the same images and labels.
    """
    mine, theirs = ({(score.image, score.label) for score in of} for of in (scores, other))
    if mine != theirs:
        image, label = sorted(mine ^ theirs)[0]
        raise UserError(
            f"the two evaluations are not of the same images and labels: only one has {label!r} in {image}; evaluate "
            "both on the same split."
        )
    first, second = dice_by_case(scores), dice_by_case(other)
    differences = np.array([first[case] - second[case] for case in first])
    difference, bounds = float(differences.mean()), interval(differences.tolist())
    if bounds is None:
        return Comparison(difference, None, None, 1.0, len(differences))
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        random_state=np.random.default_rng(0),
    )
    return Comparison(difference, *bounds, float(test.pvalue), len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down method."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted
