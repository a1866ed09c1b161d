"""Segment images of one's own by the names of the labels.

    python examples/sam_medical/predict.py --adapter runs/glas/adapter --images FOLDER --output FOLDER

Writes for each image IMAGE one mask PNG (0 and 255, at the image's own size) a label: OUTPUT/LABEL/IMAGE.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ssam.adapter import load_adapter, read_task
from ssam.data.folder import ImageFolder
from ssam.data.loading import evaluation_loader
from ssam.errors import UserError, one_line_errors
from ssam.evaluation import predict_masks
from ssam.files import replacing_file
from ssam.methods import METHODS
from ssam.options import PredictOptions, parse_options
from ssam.runtime import prepare_process


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
    for sample, masks in predict_masks(model.to(device), batches):
        for label, mask in zip(task.labels, masks, strict=True):
            with replacing_file(Path(options.output) / label / f"{sample.name}.png") as temporary:
                Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    print(f"Wrote the masks of {len(images)} images for {', '.join(task.labels)} to {options.output}.")


if __name__ == "__main__":
    main()
