"""Images and volumes of one's own, without masks, to predict on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssam.data.base import EXTENSIONS, Sample, files_by_stem, read_image_or_slice
from ssam.data.nifti import VOLUMES, name_of_slice, slices_of
from ssam.errors import UserError


class ImageFolder:
    """The images of a folder, and the slices of its volumes, by name; each is a `Sample` with no masks, (0, H, W).

    Attributes:
        items: The file of each, and the number of the slice; None for a picture.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; --images must be a folder of images.")
        self.items = [(path, number) for path in files_by_stem(folder).values() for number in slices_of(path)]
        if not self.items:
            raise UserError(f"{folder} holds no images; it may hold {', '.join((*EXTENSIONS, *VOLUMES))}.")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        path, number = self.items[index]
        image = read_image_or_slice(path, number)
        name = path.stem if number is None else name_of_slice(path, number)
        return Sample(name, image, np.zeros((0, *image.shape[:2]), dtype=bool))
