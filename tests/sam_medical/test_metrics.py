"""Dice as in the paper, and two kinds of Dice that empty masks do not increase."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from sam_medical.common.errors import UserError
from sam_medical.data.base import Sample
from sam_medical.evaluation.metrics import (
    CRITERIA,
    TOLERANCE,
    MaskScore,
    mean_dice,
    mean_scores,
    read_scores,
    score_labels,
    score_masks,
    write_scores,
)
from sam_medical.evaluation.statistics import Case, compare, dice_by_case, holm, interval
from sam_medical.training.losses import FocalDiceLoss, build_loss

LABELS = ["liver", "tumor"]


def random_masks(images, seed):
    masks = np.random.default_rng(seed).random((images, 2, 9, 7)) < 0.3
    masks[::3, 1] = False
    return masks


@pytest.fixture
def masks():
    predicted, true = random_masks(12, 0), random_masks(12, 1)
    predicted[3, 1, 0, 0] = True  # a stray pixel on a blank image
    return predicted, true


@pytest.fixture
def scores(masks):
    counts = [
        c for i, (p, t) in enumerate(zip(*masks, strict=True)) for c in score_masks(sample(t, f"image{i}"), LABELS, p)
    ]
    return score_labels(counts, LABELS)


def sample(masks, name="image", group=""):
    return Sample(name, np.zeros((*masks.shape[1:], 3), dtype=np.float32), masks, group)


def test_dice_is_monais_where_blank_on_blank_counts_one(masks, scores):
    expected = compute_dice(*(torch.from_numpy(m) for m in masks), ignore_empty=False).mean(0)
    assert [scores[label].dice for label in LABELS] == pytest.approx(expected.tolist())
    assert mean_dice(scores) == pytest.approx(expected.mean().item())


def test_dice_present_is_monais_over_the_images_that_have_the_label(masks, scores):
    expected = compute_dice(*(torch.from_numpy(m) for m in masks), ignore_empty=True).nanmean(0)
    assert [scores[label].dice_present for label in LABELS] == pytest.approx(expected.tolist())
    assert (scores["tumor"].images, scores["tumor"].images_present) == (12, 8)


def test_dice_pooled_is_the_dice_of_all_pixels_together(masks, scores):
    predicted, true = (m[:, 1].ravel() for m in masks)
    assert scores["tumor"].dice_pooled == pytest.approx(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))


@pytest.mark.parametrize("predicted_pixels, dice", [(0, 1.0), (1, 0.0)])
def test_a_blank_image_counts_one_or_nothing(predicted_pixels, dice):
    predicted, blank = np.zeros((1, 4, 4), dtype=bool), np.zeros((1, 4, 4), dtype=bool)
    predicted.flat[:predicted_pixels] = True
    score = score_labels(score_masks(sample(blank), ["tumor"], predicted), ["tumor"])["tumor"]
    assert (score.dice, score.dice_present) == (dice, None)


def test_an_adapter_that_predicts_nothing_is_the_best_by_the_papers_dice_alone():
    """Four images, one of which shows a tumor: one adapter finds it whole and draws a pixel too many elsewhere."""
    true = np.zeros((4, 1, 4, 4), dtype=bool)
    true[0, 0, :2] = True
    finds_it, nothing = true.copy(), np.zeros_like(true)
    finds_it[1:, 0, 3, 3] = True

    def judged(criterion, predicted):
        masks = [score for t, p in zip(true, predicted, strict=True) for score in score_masks(sample(t), ["tumor"], p)]
        return CRITERIA[criterion](score_labels(masks, ["tumor"]))

    assert (judged("dice", finds_it), judged("dice", nothing)) == (0.25, 0.75)
    assert (judged("pooled-dice", finds_it), judged("pooled-dice", nothing)) == (pytest.approx(16 / 19), 0)


def test_labels_that_are_nowhere_do_not_choose_an_adapter():
    true = np.zeros((2, 4, 4), dtype=bool)
    true[0, :2] = True
    labels = ["liver", "tumor"]
    scores = score_labels(score_masks(sample(true), labels, np.ones_like(true)), labels)
    assert CRITERIA["pooled-dice"](scores) == pytest.approx(16 / 24)
    assert scores["tumor"].dice_pooled is None and mean_scores(scores).dice_pooled == pytest.approx(16 / 24)
    tumor = {"tumor": scores["tumor"]}
    assert CRITERIA["pooled-dice"](tumor) == mean_dice(tumor) == 0


def test_loss_is_focal_of_every_mask_and_dice_of_those_that_are_not_blank():
    logits, masks = torch.randn(2, 3, 6, 6) * 3, (torch.rand(2, 3, 6, 6) < 0.4).float()
    masks[0, 1] = 0
    probability = logits.sigmoid()
    correct = torch.where(masks > 0, probability, 1 - probability)
    focal = (-((1 - correct) ** 2) * correct.log()).mean()
    overlap, total = (probability * masks).sum((2, 3)), (probability + masks).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    dice[0, 1] = 0
    torch.testing.assert_close(
        FocalDiceLoss(focal_weight=20)(logits, masks), 20 * focal + dice.mean(), rtol=1e-5, atol=0
    )


def outline(mask):
    """Returns the border pixels of a mask."""
    inside = np.zeros_like(mask)
    inside[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return np.argwhere(mask & ~inside)


def test_distances_are_those_between_the_outlines():
    y, x = np.mgrid[:60, :80]
    true = (y - 30) ** 2 + (x - 40) ** 2 < 15**2
    predicted = ((y - 33) ** 2 + (x - 38) ** 2 < 14**2) | ((y - 5) ** 2 + (x - 70) ** 2 < 9)
    (score,) = score_masks(sample(true[None]), ["liver"], predicted[None], distances=True)

    between = np.linalg.norm(outline(predicted)[:, None] - outline(true)[None], axis=2)
    there, back = between.min(1), between.min(0)
    assert score.hausdorff95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=0.5)
    near = TOLERANCE * 100  # the diagonal of 60 x 80
    share = ((there <= near).sum() + (back <= near).sum()) / (len(there) + len(back))
    assert score.surface_dice == pytest.approx(share, abs=0.02) and 0.05 < share < 0.8


def test_where_nothing_is_predicted_the_distance_is_the_diagonal_and_where_nothing_is_there_is_none():
    blank, disk = np.zeros((1, 30, 40), dtype=bool), np.zeros((1, 30, 40), dtype=bool)
    disk[0, 10:20, 10:20] = True
    (missed,) = score_masks(sample(disk), ["liver"], blank, distances=True)
    assert (missed.hausdorff95, missed.surface_dice) == (50, 0)
    (alarm,) = score_masks(sample(blank), ["liver"], disk, distances=True)
    assert (alarm.hausdorff95, alarm.surface_dice) == (None, None)


def test_false_alarms_and_intersection_over_union(masks, scores):
    predicted, true = masks
    blank = ~true[:, 1].any((1, 2))
    assert blank.sum() == 4
    assert scores["tumor"].false_alarms == predicted[blank, 1].any((1, 2)).mean() == 0.25
    assert scores["liver"].false_alarms is None
    iou = [(p & t).sum() / (p | t).sum() for p, t in zip(predicted[~blank, 1], true[~blank, 1], strict=True)]
    assert scores["tumor"].iou == pytest.approx(np.mean(iou))
    assert mean_scores(scores).iou == pytest.approx((scores["tumor"].iou + scores["liver"].iou) / 2)
    assert mean_scores(scores).false_alarms == 0.25


def test_scores_come_back_from_their_file(tmp_path):
    scores = [MaskScore("a, b", "liver", 3, 4, 5, 1.25, 0.5, "patient 1"), MaskScore("c", "liver", 0, 1, 0)]
    write_scores(scores, tmp_path / "scores.csv")
    assert read_scores(tmp_path / "scores.csv") == scores


def scores_of(dice):
    """Masks of 100 pixels, half of them predicted, so that the Dice of image i is dice[i]."""
    return [MaskScore(f"image{i}", "liver", round(100 * d), 100, 100) for i, d in enumerate(dice)]


def test_a_real_difference_is_found_and_noise_is_not():
    random = np.random.default_rng(0)
    base = random.uniform(0.5, 0.9, 40)
    better = scores_of(base + random.normal(0.05, 0.02, 40))
    same = scores_of(base + random.normal(0, 0.02, 40))
    found = compare(better, scores_of(base))
    assert found.cases == 40 and found.low < 0.05 < found.high and found.low > 0 and found.p_value < 0.001
    assert compare(same, scores_of(base)).p_value > 0.05
    assert compare(better, better).p_value == 1


def test_scores_of_other_images_or_labels_are_not_compared():
    with pytest.raises(UserError, match="only one has 'liver' in image2"):
        compare(scores_of([0.5, 0.6]), scores_of([0.5, 0.6, 0.7]))
    with pytest.raises(UserError, match="not of the same images and labels"):
        compare(scores_of([0.5]), [MaskScore("image0", "tumor", 1, 2, 3)])


def test_a_single_case_has_neither_interval_nor_significance():
    assert interval([Case(0.5, 1)]) is None
    found = compare(scores_of([0.7]), scores_of([0.5]))
    assert (found.difference, found.low, found.p_value, found.cases) == (pytest.approx(0.2), None, 1, 1)


def test_slices_of_one_patient_are_one_case():
    scores = [
        MaskScore(f"slice{i}", "liver", intersection, 100, 100, group=group)
        for i, (intersection, group) in enumerate([(40, "a"), (60, "a"), (90, "b"), (70, "")])
    ]
    assert dice_by_case(scores) == {"a": Case(1.0, 2), "b": Case(0.9, 1), "slice3": Case(0.7, 1)}


def test_the_interval_is_of_the_mean_over_images_however_many_a_case_has():
    """Ten patients of 100 slices at 0.9, and ten of a single slice at 0.1, which the mean hardly feels."""
    cases = [Case(90.0 + n / 10, 100) for n in range(10)] + [Case(0.1, 1) for _ in range(10)]
    low, high = interval(cases)
    assert low < sum(case.total for case in cases) / sum(case.images for case in cases) < high
    assert low > 0.85 and high < 0.92

    def slices(dice_of_patient):
        return [
            MaskScore(f"{patient}_{n}", "liver", round(100 * dice), 100, 100, group=patient)
            for patient, (dice, count) in dice_of_patient.items()
            for n in range(count)
        ]

    ours, theirs = slices({"a": (0.9, 9), "b": (0.5, 1)}), slices({"a": (0.8, 9), "b": (0.9, 1)})
    assert compare(ours, theirs).difference == pytest.approx((9 * 0.1 - 0.4) / 10)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        low, high = interval([Case(dice, 1) for dice in random.normal(0.7, 0.1, 40)])
        covered += low <= 0.7 <= high
    assert 51 <= covered <= 60


def test_images_count_once_however_many_labels_and_runs_they_have():
    scores = [*scores_of([0.4, 0.6]), MaskScore("image0", "tumor", 0, 0, 0), *scores_of([0.6, 0.8])]
    cases = {name: (case.total, case.images) for name, case in dice_by_case(scores).items()}
    assert cases == {"image0": (pytest.approx((0.4 + 1 + 0.6) / 3), 1), "image1": (pytest.approx(0.7), 1)}


def test_p_values_are_adjusted_as_holm_has_it():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_cldice_rewards_a_whole_centre_line():
    line, broken = torch.zeros(1, 1, 24, 24), torch.full((1, 1, 24, 24), -9.0)
    line[..., 10:13, 2:22] = 1
    whole = torch.where(line > 0, 9.0, -9.0)
    broken[..., 10:13, 2:22] = 9
    broken[..., 10:13, 11:13] = -9
    thinner = torch.full((1, 1, 24, 24), -9.0)
    thinner[..., 11:12, 2:22] = 9
    loss = build_loss("dice-cldice", focal_weight=20)
    assert loss(whole, line) < 0.05 < loss(broken, line)
    # A thin line loses half of its Dice, and nothing of its centre line.
    dice = 1 - (2 * 20 + 1) / (20 + 60 + 1)
    assert loss(thinner, line).item() == pytest.approx(dice / 2, abs=0.06)
    # Of two labels, each counts as much as the other.
    both = loss(torch.cat([whole, broken], 1), torch.cat([line, line], 1))
    assert both.item() == pytest.approx((loss(whole, line) + loss(broken, line)).item() / 2, abs=1e-5)
