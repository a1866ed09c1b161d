"""AdaptiveSAM (arXiv:2308.03726): biases, norms, positions, decoder and text affine layer learn."""

from __future__ import annotations

from sam_medical.methods.method import WITH_ENCODER, Method

ADAPTIVE_SAM = Method(
    "AdaptiveSAM",
    "AdaptiveSAM (arXiv:2308.03726)",
    trained=(*WITH_ENCODER, "mask decoder"),
    biases=True,
    learning_rate=1e-3,
)
