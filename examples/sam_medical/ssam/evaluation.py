"""A model's masks for a dataset, at the images' own sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from ssam.data import Sample
from ssam.data.loading import EvaluationBatch
from ssam.metrics import MaskScore, score_masks


@torch.no_grad()
def predict_masks(model: nn.Module, batches: Iterable[EvaluationBatch]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Each sample with its predicted masks, bool (K, H, W) at the image's own size."""
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        mask_logits = model(batch["images"].to(device), batch["masks"].to(device)).float()
        for sample, logits in zip(batch["samples"], mask_logits, strict=True):
            size = sample.image.shape[:2]
            full_size = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
            yield sample, (full_size > 0).cpu().numpy()


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    labels: Sequence[str],
    title: str,
    distances: bool = False,
) -> list[MaskScore]:
    """The scores of every image and label; model and batches are what accelerate prepared, on every process."""
    batches = tqdm(batches, desc=title, unit="batch", leave=False, disable=not accelerator.is_main_process)
    scores: list[MaskScore] = []
    for sample, predicted in predict_masks(model, batches):
        scores += score_masks(sample, labels, predicted, distances)
    # Some processes repeat images at the end, to have as many batches as the others.
    return list({(score.image, score.label): score for score in gather_object(scores)}.values())
