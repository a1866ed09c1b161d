"""Dice as the paper counts it, beside two that blank images cannot lift."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from ssam.losses import FocalDiceLoss
from ssam.metrics import count_masks, mean_dice, score_labels

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
    counts = [c for i, (p, t) in enumerate(zip(*masks, strict=True)) for c in count_masks(f"image{i}", LABELS, p, t)]
    return score_labels(counts, LABELS)


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
    score = score_labels(count_masks("image", ["tumor"], predicted, blank), ["tumor"])["tumor"]
    assert (score.dice, score.dice_present) == (dice, None)


def test_loss_is_focal_and_dice_of_each_image_and_label():
    logits, masks = torch.randn(2, 3, 6, 6) * 3, (torch.rand(2, 3, 6, 6) < 0.4).float()
    masks[0, 1] = 0
    probability = logits.sigmoid()
    correct = torch.where(masks > 0, probability, 1 - probability)
    focal = (-((1 - correct) ** 2) * correct.log()).mean()
    overlap, total = (probability * masks).sum((2, 3)), (probability + masks).sum((2, 3))
    dice = (1 - (2 * overlap + 1) / (total + 1)).mean()
    torch.testing.assert_close(FocalDiceLoss(focal_weight=20)(logits, masks), 20 * focal + dice, rtol=1e-5, atol=0)
