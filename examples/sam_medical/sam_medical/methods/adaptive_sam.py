"""AdaptiveSAM (arXiv:2308.03726): biases, norms, positions, decoder and text affine layer learn."""

from __future__ import annotations

from sam_medical.methods.method import Method
from sam_medical.methods.s_sam import PARTS
from sam_medical.methods.tuners import InPlaceTuner

ADAPTIVE_SAM = Method(
    "AdaptiveSAM",
    "AdaptiveSAM (arXiv:2308.03726)",
    tuner=InPlaceTuner(parts=(*PARTS, "mask decoder"), biases=True),
    learning_rate=1e-3,
)
