"""Data loaders: samples become resized, augmented batches, reproducible from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np
import torch
from monai import transforms
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from sam_medical.common.signals import ignore_signals
from sam_medical.data.augmentation import build_augmentation
from sam_medical.data.base import Sample, SegmentationDataset

# Cache size for resized training images, shared by all workers. Images beyond it are read again in every epoch.
KEPT_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Framing:
    """How images of any size are mapped to the model's square input.

    Attributes:
        image_size: Side S of the square, in pixels.
        fit: "stretch", or "pad" to keep the aspect ratio by black pixels below or to the right.
        tile: Side of training crops and of the sliding window, in pixels of the original image; None for whole images.
    """

    image_size: int
    fit: str = "stretch"
    tile: int | None = None

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of the region that is resized to the square."""
        if self.tile:
            return self.tile, self.tile
        return (max(height, width),) * 2 if self.fit == "pad" else (height, width)

    def pixels_for_one(self, height: int, width: int) -> float:
        """Returns the number of original pixels per model pixel."""
        frame = self.frame(height, width)
        return frame[0] * frame[1] / self.image_size**2

    @property
    def remedy(self) -> str:
        """What to do if labels vanish at the model's size."""
        if self.tile:
            return f"give a --tile nearer to the image size, {self.image_size}"
        return "give --tile 256, which trains on crops, or a larger --image-size"


class TrainingBatch(TypedDict):
    """Images (B, 3, S, S) between zero and one, and masks (B, K, S, S) of zeros and ones."""

    images: Tensor
    masks: Tensor


class EvaluationBatch(TypedDict):
    """Images (B, 3, S, S) between zero and one, and their samples.

    ``masks`` (B, K, S, S) are true masks for expert prompts. A pixel belongs to a label if any part of it
    does, so even the smallest object can be prompted. With tiles, S = 0: the sliding window reads the samples.
    """

    images: Tensor
    masks: Tensor
    samples: list[Sample]
    framing: Framing


class Samples(Protocol):
    """A sequence of samples: a dataset, the slices of a file, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def training_loader(
    dataset: SegmentationDataset,
    framing: Framing | int,
    batch_size: int,
    augmentation: str,
    seed: int,
    first: int,
    last: int,
    num_workers: int = 0,
    kept_bytes: int = KEPT_BYTES,
) -> DataLoader:
    """Returns a loader of `TrainingBatch`es.

    Args:
        dataset: The training images.
        framing: How images are mapped to the model's input; an int is the image size.
        batch_size: Images per batch.
        augmentation: A name in `AUGMENTATIONS`.
        seed: Seed of the image order and of the augmentation.
        first: Position in the run of the first image; above 0 if a run is resumed.
        last: Position after the last image.
        num_workers: Worker processes; 0 reads in this process.
        kept_bytes: Cache size of all workers together.
    """
    framing = as_framing(framing)
    framed = FramedDataset(dataset, framing)
    kept_by_each = kept_bytes // max(1, num_workers)
    views = transforms.Compose([*cropping(framing), *build_augmentation(augmentation, dataset.labels).transforms])
    return DataLoader(
        AugmentedDataset(framed, views, seed, kept_by_each),
        batch_size=batch_size,
        sampler=TrainingSampler(len(dataset), seed, first, last),
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        # Iterating a loader draws from its generator. The global one must not advance, or resumed runs would differ.
        generator=torch.Generator(),
    )


def evaluation_loader(dataset: Samples, framing: Framing | int, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Returns a loader of `EvaluationBatch`es, in the order of the dataset."""
    return DataLoader(
        EvaluationDataset(dataset, as_framing(framing)),
        batch_size=batch_size,
        collate_fn=_collate_samples,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


def _begin_worker(number: int) -> None:
    """Lets workers ignore signals to the process group: the training process handles them and ends its workers."""
    ignore_signals()


def spread(dataset: Samples, count: int) -> list[Sample]:
    """Returns up to ``count`` samples, evenly spaced over the dataset."""
    chosen = thinned(dataset, count)
    return [chosen[index] for index in range(len(chosen))]


def thinned(dataset: Samples, count: int | None) -> Samples:
    """Returns up to ``count`` evenly spaced samples of a dataset as a lazy subset; the whole dataset for None."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())  # type: ignore[arg-type]


class FramedDataset(Dataset):
    """Images and masks at the model's input size; with tiles, whole images to crop from."""

    def __init__(self, dataset: SegmentationDataset, framing: Framing) -> None:
        self.dataset = dataset
        self.framing = framing
        self.resize_image = image_resizing(framing.image_size)

    def __getitem__(self, index: int) -> TrainingBatch:
        sample = self.dataset[index]
        image = sample.image.transpose(2, 0, 1)
        if self.framing.tile:
            return {"images": torch.from_numpy(image.copy()), "masks": torch.from_numpy(sample.masks.astype(np.uint8))}
        masks = masks_for_training(sample, self.framing)
        return {"images": self.resize_image(padded(image, self.framing)), "masks": masks}


class AugmentedDataset(Dataset):
    """Random views of cached images.

    `TrainingSampler` yields the keys (epoch, index). An item's random numbers depend only on the seed and its key.
    Neither the number of workers nor a resumed run changes them.
    """

    def __init__(self, dataset: FramedDataset, views: transforms.Compose, seed: int, kept_bytes: int) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed
        self.kept_bytes = kept_bytes
        self.kept: dict[int, TrainingBatch] = {}

    def __getitem__(self, key: tuple[int, int]) -> TrainingBatch:
        epoch, index = key
        item = self.kept.get(index) or self.dataset[index]
        size = item["images"].nbytes + item["masks"].nbytes
        if size * (len(self.kept) + 1) <= self.kept_bytes:
            self.kept[index] = item
        self.views.set_random_state(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        view = self.views(dict(item))
        view = view[0] if isinstance(view, list) else view  # the crop transform returns a list of one
        return {name: torch.as_tensor(view[name]).as_subclass(Tensor) for name in ("images", "masks")}  # type: ignore[return-value]


class EvaluationDataset(Dataset):
    """Images and masks at the model's input size, with their samples."""

    def __init__(self, dataset: Samples, framing: Framing) -> None:
        self.dataset = dataset
        self.framing = framing
        self.resize_image = image_resizing(framing.image_size)
        self.resize_masks = mask_resizing(framing.image_size, least_share=1e-6)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Sample, Framing]:
        sample = self.dataset[index]
        if self.framing.tile:
            return torch.empty(3, 0, 0), torch.empty(len(sample.masks), 0, 0), sample, self.framing
        image = self.resize_image(padded(sample.image.transpose(2, 0, 1), self.framing)).as_tensor()
        # Images to predict on have no masks, so there is nothing to resize.
        masks = image[:0]
        if len(sample.masks):
            masks = self.resize_masks(padded(sample.masks.astype(np.float32), self.framing)).as_tensor()
        return image, masks, sample, self.framing


class TrainingSampler(Sampler):
    """Yields (epoch, index) pairs of one shuffled epoch after the other, between two positions of a run.

    Args:
        images: Number of images per epoch.
        seed: Seed of the order.
        first: First position; above 0 if a run is resumed.
        last: Position after the last one.
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


def as_framing(framing: Framing | int) -> Framing:
    return Framing(framing) if isinstance(framing, int) else framing


def padded(channels: np.ndarray, framing: Framing) -> np.ndarray:
    """Pads channels (C, H, W) to a square with zeros below or to the right if the framing keeps the aspect ratio."""
    if framing.fit != "pad":
        return channels
    height, width = channels.shape[1:]
    side = max(height, width)
    return np.pad(channels, ((0, 0), (0, side - height), (0, side - width)))


def cropping(framing: Framing) -> list[transforms.Transform]:
    """Returns transforms that crop, half of the time around a label, and resize; nothing without tiles."""
    if not framing.tile:
        return []
    both, tile = ("images", "masks"), (framing.tile, framing.tile)
    return [
        transforms.SpatialPadd(both, tile, method="end"),
        transforms.RandCropByPosNegLabeld(both, "masks", tile, pos=1, neg=1, num_samples=1),
        transforms.Lambdad("masks", lambda masks: masks.float()),
        transforms.Lambdad("images", image_resizing(framing.image_size)),
        transforms.Lambdad("masks", mask_resizing(framing.image_size)),
    ]


def masks_for_training(sample: Sample, framing: Framing) -> Tensor:
    """Returns the masks at the model's resolution, (K, S, S); with tiles, those of the whole image."""
    masks = padded(sample.masks.astype(np.float32), framing)
    if not framing.tile:
        return mask_resizing(framing.image_size)(masks)
    scale = framing.image_size / framing.tile
    size = [max(1, round(side * scale)) for side in masks.shape[1:]]
    return transforms.Resize(size, mode="area")(torch.from_numpy(masks)) >= 0.5


def image_resizing(image_size: int) -> transforms.Transform:
    return transforms.Resize((image_size, image_size), mode="bilinear", anti_aliasing=True)


def mask_resizing(image_size: int, least_share: float = 0.5) -> transforms.Transform:
    """Returns a transform that assigns a pixel to a label if at least that share of its area belongs to it."""
    return transforms.Compose(
        [transforms.Resize((image_size, image_size), mode="area"), transforms.AsDiscrete(threshold=least_share)]
    )


def _collate_samples(items: list[tuple[Tensor, Tensor, Sample, Framing]]) -> EvaluationBatch:
    images, masks, samples, framings = zip(*items, strict=True)
    return {
        "images": torch.stack(images),
        "masks": torch.stack(masks),
        "samples": list(samples),
        "framing": framings[0],
    }
