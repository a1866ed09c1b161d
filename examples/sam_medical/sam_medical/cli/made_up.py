"""Write a small made-up data set, to try the commands of the README on.

    python examples/sam_medical/made_up.py ct FOLDER

- ct: twenty volumes in Hounsfield units, with padding of -3024, metal in every other, a tumor 30 HU below its liver.
- orientations: twenty volumes in which a model must know the front from the back; new/ holds one more, stored in three
  orientations, and truth.nii.gz where its organ is.
- small-lesions: ten pictures of 565 x 584 pixels with lesions of 3 x 3.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sam_medical.common.errors import UserError, one_line_errors

KINDS = ("ct", "orientations", "small-lesions")


@one_line_errors
def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        raise UserError(f"give one of {', '.join(KINDS)}, and the folder to write.")
    folder = Path(sys.argv[2])
    if folder.exists():
        raise UserError(f"{folder} is there already; give a folder that is not.")
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.data.made_up import WRITERS

    WRITERS[sys.argv[1]](folder)
    print(folder)
