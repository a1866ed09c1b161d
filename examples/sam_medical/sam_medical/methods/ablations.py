"""The paper's Table 3: each row adds one thing to S-SAM's frozen start."""

from __future__ import annotations

from sam_medical.methods.method import Method
from sam_medical.methods.s_sam import SSAM, svd

POSITIONS = Method("positions", f"{SSAM}, Table 3", trained=("positions",))


NORMS = Method("positions, norms", f"{SSAM}, Table 3", trained=("positions", "norms"))


TEXT = Method("positions, text affine", f"{SSAM}, Table 3", trained=("positions", "text affine"))


SCALE = Method(
    "positions, text affine, scale",
    f"{SSAM}, Table 3",
    adapter=svd(shift=False),
    trained=("positions", "text affine"),
)


SHIFT = Method(
    "positions, text affine, shift",
    f"{SSAM}, Table 3",
    adapter=svd(scale=False),
    trained=("positions", "text affine"),
)


NO_NORMS = Method(
    "positions, text affine, scale, shift",
    f"{SSAM}, without norms",
    adapter=svd(),
    trained=("positions", "text affine"),
)
