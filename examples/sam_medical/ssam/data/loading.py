"""From samples to batches: resized, augmented for training, and the same in every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypedDict

import numpy as np
import torch
from monai import transforms
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ssam.data.augmentation import build_augmentation
from ssam.data.base import Sample, SegmentationDataset
from ssam.signals import ignore_signals

# Of resized training images, in all worker processes together; the rest of a larger dataset is read again each time.
KEPT_BYTES = 2 * 1024**3


class TrainingBatch(TypedDict):
    """Images (B, 3, S, S) between zero and one, and masks (B, K, S, S) of zeros and ones."""

    images: Tensor
    masks: Tensor


class EvaluationBatch(TypedDict):
    """Images (B, 3, S, S) between zero and one, and the samples that they are from.

    ``masks`` (B, K, S, S) are the true ones for prompts that an expert gives: a pixel belongs to a label if any part
    of it does, so that none is too small to be pointed at.
    """

    images: Tensor
    masks: Tensor
    samples: list[Sample]


class Samples(Protocol):
    """Anything that gives samples by their number: a dataset, an image folder, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def training_loader(
    dataset: SegmentationDataset,
    image_size: int,
    batch_size: int,
    augmentation: str,
    seed: int,
    first: int,
    last: int,
    num_workers: int = 0,
    kept_bytes: int = KEPT_BYTES,
) -> DataLoader:
    """`TrainingBatch`es of the images at positions ``first`` to ``last`` of a run."""
    resized = ResizedDataset(dataset, image_size)
    kept_by_each = kept_bytes // max(1, num_workers)
    return DataLoader(
        AugmentedDataset(resized, build_augmentation(augmentation), seed, kept_by_each),
        batch_size=batch_size,
        sampler=TrainingSampler(len(dataset), seed, first, last),
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own, beginning to read would move torch's random numbers on, and a resumed run's with it.
        generator=torch.Generator(),
    )


def evaluation_loader(dataset: Samples, image_size: int, batch_size: int, num_workers: int = 0) -> DataLoader:
    """`EvaluationBatch`es of a dataset, in order."""
    return DataLoader(
        EvaluationDataset(dataset, image_size),
        batch_size=batch_size,
        collate_fn=_collate_samples,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


def _begin_worker(number: int) -> None:
    """A signal to the whole process group is for the process that trains, which ends its workers itself."""
    ignore_signals()


def spread(dataset: Samples, count: int) -> list[Sample]:
    """Some samples of a dataset, evenly from its first to its last."""
    chosen = thinned(dataset, count)
    return [chosen[index] for index in range(len(chosen))]


def thinned(dataset: Samples, count: int | None) -> Samples:
    """So many samples of a dataset, evenly from its first to its last; all of them if there are fewer, or for None."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())  # type: ignore[arg-type]


class ResizedDataset(Dataset):
    """Images and masks stretched to the model's square."""

    def __init__(self, dataset: SegmentationDataset, image_size: int) -> None:
        self.dataset = dataset
        self.resize_image = image_resizing(image_size)
        self.resize_masks = mask_resizing(image_size)

    def __getitem__(self, index: int) -> TrainingBatch:
        sample = self.dataset[index]
        masks = self.resize_masks(sample.masks.astype(np.float32))
        return {"images": self.resize_image(sample.image.transpose(2, 0, 1)), "masks": masks}


class AugmentedDataset(Dataset):
    """Random views of images that are read once and kept.

    Items are asked for as (epoch, index), which `TrainingSampler` gives. An item's random numbers depend on the seed
    and these two alone, so that neither worker processes nor an interruption change them.
    """

    def __init__(self, dataset: ResizedDataset, augmentation: transforms.Compose, seed: int, kept_bytes: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.kept_bytes = kept_bytes
        self.kept: dict[int, TrainingBatch] = {}

    def __getitem__(self, key: tuple[int, int]) -> TrainingBatch:
        epoch, index = key
        item = self.kept.get(index) or self.dataset[index]
        size = item["images"].nbytes + item["masks"].nbytes
        if size * (len(self.kept) + 1) <= self.kept_bytes:
            self.kept[index] = item
        self.augmentation.set_random_state(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        augmented = self.augmentation(dict(item))
        return {"images": augmented["images"].as_tensor(), "masks": augmented["masks"].as_tensor()}


class EvaluationDataset(Dataset):
    """Images and masks stretched to the model's square, with the samples that they are from."""

    def __init__(self, dataset: Samples, image_size: int) -> None:
        self.dataset = dataset
        self.resize_image = image_resizing(image_size)
        self.resize_masks = mask_resizing(image_size, least_share=1e-6)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Sample]:
        sample = self.dataset[index]
        image = self.resize_image(sample.image.transpose(2, 0, 1)).as_tensor()
        # Images without masks, which are to be segmented, have none of any size.
        masks = self.resize_masks(sample.masks.astype(np.float32)).as_tensor() if len(sample.masks) else image[:0]
        return image, masks, sample


class TrainingSampler(Sampler):
    """One shuffled epoch after the other, as (epoch, index) pairs, between two positions of a run.

    Args:
        images: How many images an epoch has.
        first: Position to begin at; above zero where a run is resumed.
        last: Position to end before.
    """

    def __init__(self, images: int, seed: int, first: int, last: int) -> None:
        self.images = images
        self.seed = seed
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.first
        while position < self.last:
            epoch, done = divmod(position, self.images)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            for index in order[done : done + self.last - position]:
                yield epoch, int(index)
                position += 1


def image_resizing(image_size: int) -> transforms.Transform:
    return transforms.Resize((image_size, image_size), mode="bilinear", anti_aliasing=True)


def mask_resizing(image_size: int, least_share: float = 0.5) -> transforms.Transform:
    """A pixel belongs to a label if that share of its area does."""
    return transforms.Compose(
        [transforms.Resize((image_size, image_size), mode="area"), transforms.AsDiscrete(threshold=least_share)]
    )


def _collate_samples(items: list[tuple[Tensor, Tensor, Sample]]) -> EvaluationBatch:
    images, masks, samples = zip(*items, strict=True)
    return {"images": torch.stack(images), "masks": torch.stack(masks), "samples": list(samples)}
