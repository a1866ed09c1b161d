"""Segment images of one's own by the names of the labels.

    python examples/sam_medical/predict.py --adapter runs/glas/adapter --images FOLDER --output FOLDER

Writes for each image IMAGE one mask PNG (0 and 255, at the image's own size) a label: OUTPUT/LABEL/IMAGE.png; for each
NIfTI VOLUME one mask volume (0 and 1) a label: OUTPUT/LABEL/VOLUME.nii.gz.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ssam.adapter import load_adapter
from ssam.data.folder import ImageFolder
from ssam.data.loading import evaluation_loader
from ssam.data.nifti import is_volume, without_suffix, write_mask_volume
from ssam.errors import UserError, one_line_errors
from ssam.evaluation import predict_masks
from ssam.files import folder_in, replacing_file
from ssam.methods import METHODS
from ssam.options import PredictOptions, parse_options
from ssam.runtime import prepare_process
from ssam.task import read_task


@one_line_errors
def main() -> None:
    options = parse_options(PredictOptions)
    prepare_process()
    images = ImageFolder(Path(options.images))
    method = METHODS[read_task(Path(options.adapter)).method]
    if method.needs_expert:
        raise UserError(f"{method.title} needs a {method.prompts} in each label, which images alone do not give.")
    model, task = load_adapter(Path(options.adapter), options.backbone)
    device = Accelerator().device
    batches = tqdm(evaluation_loader(images, task.image_size, options.batch_size), unit="batch")
    predictions = predict_masks(model.to(device), batches)
    pairs = zip(images.items, predictions, strict=True)
    files = 0
    for path, of_file in groupby(pairs, key=lambda pair: pair[0][0]):
        slices = [masks for _, (_, masks) in of_file]
        for label, masks_of_label in zip(task.labels, zip(*slices, strict=True), strict=True):
            write_masks(path, masks_of_label, folder_in(Path(options.output), label))
        files += 1
    print(f"Wrote the masks of {files} files for {', '.join(task.labels)} to {options.output}.")


def write_masks(source: Path, masks: Sequence[np.ndarray], folder: Path) -> None:
    """The mask of a picture, or those of a volume's slices, bool (H, W), under the name of what they are of."""
    if is_volume(source):
        write_mask_volume(folder / f"{without_suffix(source.name)}.nii.gz", masks, source)
        return
    (mask,) = masks
    with replacing_file(folder / f"{source.stem}.png") as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")


if __name__ == "__main__":
    main()
