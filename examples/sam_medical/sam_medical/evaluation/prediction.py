"""Prediction of masks at the original image sizes, and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from tqdm import tqdm

from sam_medical.data.base import Sample
from sam_medical.data.loading import EvaluationBatch, Framing
from sam_medical.evaluation.metrics import MaskScore, score_masks

# Overlap of neighbouring windows. Gaussian weights give the centre of each window the most influence.
OVERLAP = 0.25


@torch.no_grad()
def predict_logits(model: nn.Module, batches: Iterable[EvaluationBatch]) -> Iterator[tuple[Sample, Tensor]]:
    """Yields each sample with its mask logits (K, H, W) at the original image size."""
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        framing = batch["framing"]
        if framing.tile:
            for sample in batch["samples"]:
                yield sample, _slide(model, sample, framing, device)
            continue
        mask_logits = model(batch["images"].to(device), batch["masks"].to(device)).float()
        for sample, logits in zip(batch["samples"], mask_logits, strict=True):
            height, width = sample.image.shape[:2]
            yield sample, _resized(logits[None], framing.frame(height, width))[0, :, :height, :width]


def predict_masks(model: nn.Module, batches: Iterable[EvaluationBatch]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Yields each sample with its predicted masks, bool (K, H, W) at the original image size."""
    for sample, logits in predict_logits(model, batches):
        yield sample, (logits > 0).cpu().numpy()


def _slide(model: nn.Module, sample: Sample, framing: Framing, device: torch.device) -> Tensor:
    """Returns mask logits (K, H, W) of a whole image by sliding-window inference."""
    assert framing.tile
    tile, side = (framing.tile, framing.tile), (framing.image_size, framing.image_size)

    def predict(windows: Tensor) -> Tensor:
        if tile != side:
            windows = F.interpolate(windows, size=side, mode="bilinear", align_corners=False, antialias=True)
        return _resized(model(windows, windows[:, :0]).float(), tile)

    image = torch.from_numpy(sample.image.transpose(2, 0, 1).copy())[None].to(device)
    return sliding_window_inference(image, tile, 4, predict, overlap=OVERLAP, mode="gaussian")[0]  # type: ignore[index]


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    labels: Sequence[str],
    title: str,
    distances: bool = False,
) -> list[MaskScore]:
    """Scores every image and label, on all processes.

    Args:
        accelerator: The accelerator that prepared model and batches.
        model: The model.
        batches: The batches of this process.
        labels: The K label names.
        title: The title of the progress bar.
        distances: Whether to compute surface distances, which is slow.

    Returns:
        The scores of all processes, without duplicates.
    """
    batches = tqdm(batches, desc=title, unit="batch", leave=False, disable=not accelerator.is_main_process)
    scores: list[MaskScore] = []
    for sample, predicted in predict_masks(model, batches):
        scores += score_masks(sample, labels, predicted, distances)
    # Some processes repeat images at the end, so that all have the same number of batches.
    return list({(score.image, score.label): score for score in gather_object(scores)}.values())
