"""Images of one's own, without masks, to predict on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssam.data.base import EXTENSIONS, Sample, images_by_stem, read_image
from ssam.errors import UserError


class ImageFolder:
    """The images of a folder by name; each is a `Sample` with no masks, (0, H, W)."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; --images must be a folder of images.")
        self.paths = list(images_by_stem(folder).values())
        if not self.paths:
            raise UserError(f"{folder} holds no images; it may hold {', '.join(EXTENSIONS)}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.paths[index])
        return Sample(self.paths[index].stem, image, np.zeros((0, *image.shape[:2]), dtype=bool))
