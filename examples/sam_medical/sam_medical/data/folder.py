"""Images and volumes without masks, for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam_medical.common.errors import UserError
from sam_medical.data.base import Sample
from sam_medical.data.decoding import EXTENSIONS, is_dicom, suffix_of
from sam_medical.data.reading import Reading, name_of, numbers_of, read_slice
from sam_medical.data.sources import Source, find_sources, source_of_file


def sources_to_segment(path: Path, skip: Sequence[Path] = ()) -> tuple[list[Source], list[Path]]:
    """Finds the images in a file or, recursively, in a folder.

    Args:
        path: The file or folder.
        skip: Folders to leave out, such as the output folder.

    Returns:
        The images, and the files that are not images.

    Raises:
        UserError: if there is not an image.
    """
    if path.is_file():
        if not suffix_of(path.name) and not is_dicom(path):
            raise UserError(f"{path} is not an image; it may be {', '.join(EXTENSIONS)}, or DICOM without an ending.")
        return [source_of_file(path)], []
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; --images must be a file or a folder of images.")
    sources, unknown = find_sources(path, skip)
    if not sources:
        raise UserError(f"{path} holds no images; it may hold {', '.join(EXTENSIONS)}.")
    return sources, unknown


class Slices:
    """The slices of one source. Each is a `Sample` without masks: their shape is (0, H, W)."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.source = source
        self.reading = reading
        self.numbers = numbers_of(source, reading.plane)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        number = self.numbers[index]
        image = read_slice(self.source, number, self.reading)
        return Sample(name_of(self.source, number), image, np.zeros((0, *image.shape[:2]), dtype=bool))
