"""A backbone, a method and a dataset outside of the package, as a user would write them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sam_medical.data.base import Sample, SegmentationDataset
from sam_medical.methods.method import Method
from sam_medical.methods.tuners import PeftTuner
from sam_medical.models.backbone import Backbone, LayerPatterns, QueryAndValueRows, check_image_size
from svdtune import SVDScaleShiftConfig

STRIDE, WIDTH = 4, 16


class Squares(SegmentationDataset):
    """Synthetic grey images with a bright square."""

    splits = ("train", "validation", "test")
    labels = ("square",)

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> Sample:
        random = np.random.default_rng([self.splits.index(self.split), index])
        image, mask = random.uniform(0, 0.4, (32, 32, 3)).astype(np.float32), np.zeros((1, 32, 32), bool)
        row, column = random.integers(2, 18, 2)
        mask[0, row : row + 12, column : column + 12] = True
        image[mask[0]] += 0.6
        return Sample(f"{self.split}-{index}", image, mask)


class Patches(Backbone):
    """Patches, two linear layers with positions between them, and a dot product of tokens with embeddings."""

    target_modules = r"image_encoder\.(first|last)"
    patterns = LayerPatterns("image_encoder.last", "image_encoder.first", "mask_decoder", "mask_decoder")

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        self.name, self.image_size = name, image_size
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image_encoder = nn.ModuleDict(
                {
                    "first": nn.Linear(3 * STRIDE**2, WIDTH),
                    "norm": nn.LayerNorm(WIDTH),
                    "last": nn.Linear(WIDTH, WIDTH),
                }
            )
            self.prompt_encoder = nn.Linear(4, WIDTH)
            self.mask_decoder = nn.Linear(WIDTH, WIDTH)

    @classmethod
    def load(cls, name, image_size):
        check_image_size(image_size, STRIDE, name)
        return cls(name, image_size)

    @property
    def prompt_width(self):
        return WIDTH

    @property
    def grid(self):
        return self.image_size // STRIDE, self.image_size // STRIDE

    def encode(self, images):
        patches = nn.functional.pixel_unshuffle(images, STRIDE).movedim(1, -1)
        encoder = self.image_encoder
        return encoder["last"](encoder["norm"](torch.relu(encoder["first"](patches)))).movedim(-1, 1)

    def embed_points(self, points):
        return self.prompt_encoder(torch.cat([points, points], -1) / self.image_size)[:, :, None]

    def embed_boxes(self, boxes):
        return self.prompt_encoder(boxes / self.image_size)[:, :, None]

    def decode(self, image_embeddings, prompts):
        return torch.einsum("bchw,bpc->bphw", image_embeddings, self.mask_decoder(prompts.tokens.mean(2)))

    def blocks(self):
        return [self.image_encoder["last"]]

    def query_and_value_rows(self):
        return {"image_encoder.last": QueryAndValueRows(torch.arange(8), torch.arange(8, 16))}

    def give_mask_per_label(self, labels):
        raise NotImplementedError

    def prompt_encoder_parts(self):
        return ["prompt_encoder"]

    def default_prompt_parts(self):
        return []

    def mask_decoder_parts(self):
        return ["mask_decoder"]


SHIFT_ONLY = Method(
    "shift only",
    "ours",
    tuner=PeftTuner(
        lambda backbone, targets: SVDScaleShiftConfig(target_modules=targets, scale=False),
        parts=("norms", "prompts", "mask decoder"),
    ),
    learning_rate=1e-2,
)
