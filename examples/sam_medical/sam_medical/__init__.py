"""Segment medical images by the names of labels: S-SAM, its rivals, and the commands that train and use them.

import sam_medical
segmenter = sam_medical.load("runs/demo/adapter")
segmenter.segment("scan.nii.gz").save("masks")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_medical.evaluation.segmenter import Segmentation, Segmenter, load

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "load"]


def __getattr__(name: str) -> Any:
    """Imports models only for those who segment: commands answer --help without them."""
    if name in __all__:
        from sam_medical.evaluation import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
