"""Segment images of one's own by the names of the labels.

    python examples/sam_medical/predict.py --adapter runs/glas/adapter --images FOLDER --output FOLDER

--images is a file, a DICOM series, or a folder of them and of folders. What is written for each of them:

- a picture: a mask PNG per label (0 and 255, at the picture's own size), OUTPUT/LABEL/NAME.png;
- a stack of pictures: OUTPUT/LABEL/NAME.tif;
- a volume or DICOM series: OUTPUT/LABEL/NAME.nii.gz (0 and 1), where its image lies in space;
- DICOM, beside these: one DICOM SEG of all labels, OUTPUT/dicom-seg/NAME.dcm.

What cannot be read is named at the end, and makes the exit code 3.
"""

from __future__ import annotations

from sam_medical.common.errors import one_line_errors
from sam_medical.options.commands import PredictOptions
from sam_medical.options.parsing import parse_options


@one_line_errors
def main() -> None:
    options = parse_options(PredictOptions)
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.evaluation.segmenting import segment_files

    segment_files(options)
