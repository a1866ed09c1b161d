"""S-SAM (arXiv:2408.06447): scaled and shifted singular values; norms, positions and text affine layer learn whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from peft import PeftConfig

from sam_medical.methods.method import Method
from sam_medical.methods.tuners import PeftTuner
from sam_medical.models.backbone import Backbone, Part
from svdtune import SVDScaleShiftConfig

SOURCE = "S-SAM (arXiv:2408.06447)"
# The parts that S-SAM trains whole, beside the layers that it tunes.
PARTS: tuple[Part, ...] = ("norms", "positions", "prompts")
LATE_SHARE = 1 / 3


def svd(**choices: Any) -> Callable[[Backbone, str], SVDScaleShiftConfig]:
    """A configuration of scale and shift with these choices, for any layers."""
    return lambda backbone, target_modules: SVDScaleShiftConfig(target_modules=target_modules, **choices)


def late_svd(backbone: Backbone, target_modules: str) -> PeftConfig:
    """Scale and shift in the last third of the layers only."""
    names = [name for name, _ in backbone.named_modules() if re.fullmatch(target_modules, name)]
    return SVDScaleShiftConfig(target_modules=names[-round(LATE_SHARE * len(names)) :])


S_SAM = Method("S-SAM", SOURCE, tuner=PeftTuner(svd(), PARTS))
S_SAM_LATE = Method("S-SAM, last third", f"{SOURCE}, tuned in the last blocks", tuner=PeftTuner(late_svd, PARTS))
