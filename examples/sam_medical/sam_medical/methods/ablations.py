"""The rows of the paper's Table 3: each adds one thing to S-SAM's frozen start."""

from __future__ import annotations

from sam_medical.methods.method import Method
from sam_medical.methods.s_sam import SOURCE, svd
from sam_medical.methods.tuners import InPlaceTuner, PeftTuner
from sam_medical.models.backbone import Part

TABLE = f"{SOURCE}, Table 3"
PARTS: tuple[Part, ...] = ("positions", "prompts")

POSITIONS = Method("positions", TABLE, tuner=InPlaceTuner(parts=("positions",)))
NORMS = Method("positions, norms", TABLE, tuner=InPlaceTuner(parts=("positions", "norms")))
TEXT = Method("positions, text affine", TABLE, tuner=InPlaceTuner(parts=PARTS))
SCALE = Method("positions, text affine, scale", TABLE, tuner=PeftTuner(svd(shift=False), PARTS))
SHIFT = Method("positions, text affine, shift", TABLE, tuner=PeftTuner(svd(scale=False), PARTS))
NO_NORMS = Method("positions, text affine, scale, shift", f"{SOURCE}, without norms", tuner=PeftTuner(svd(), PARTS))
