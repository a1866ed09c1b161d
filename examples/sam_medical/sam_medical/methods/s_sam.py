"""S-SAM (arXiv:2408.06447): scale and shift of singular values; norms, positions and text affine layer learn whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from peft import PeftConfig

from sam_medical.methods.method import WITH_ENCODER, Method
from sam_medical.models.prompted_sam import PromptedSam
from svdtune import SVDScaleShiftConfig

SSAM = "S-SAM (arXiv:2408.06447)"
LATE_SHARE = 1 / 3


def svd(**choices: Any) -> Callable[[PromptedSam, str], PeftConfig]:
    return lambda model, target_modules: SVDScaleShiftConfig(target_modules=target_modules, **choices)


def late_svd(model: PromptedSam, target_modules: str) -> PeftConfig:
    """Scale and shift in the last third of the layers alone."""
    names = [name for name, _ in model.named_modules() if re.fullmatch(target_modules, name)]
    return SVDScaleShiftConfig(target_modules=names[-round(LATE_SHARE * len(names)) :])


S_SAM = Method("S-SAM", SSAM, adapter=svd(), trained=WITH_ENCODER)


S_SAM_LATE = Method("S-SAM, last third", f"{SSAM}, tuned in the last blocks", adapter=late_svd, trained=WITH_ENCODER)
