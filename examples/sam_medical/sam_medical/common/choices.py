"""The choices of options. This module imports nothing heavy, so ``--help`` is fast.

Modules that implement a choice import it from here. Tests check that each choice is implemented.
"""

from __future__ import annotations

from typing import Literal, get_args

Plane = Literal["axial", "coronal", "sagittal", "stored"]
Fit = Literal["stretch", "pad"]
Prompt = Literal["text", "learned"]
Augmentation = Literal["upright", "any-orientation", "published", "none"]
Precision = Literal["no", "bf16", "fp16"]
Criterion = Literal["pooled-dice", "dice"]

PLANES: tuple[str, ...] = get_args(Plane)
FITS: tuple[str, ...] = get_args(Fit)
PROMPTS: tuple[str, ...] = get_args(Prompt)

# The syntax of two options, for help texts and error messages.
INTENSITY_FORMS = (
    "auto, window:40,400, three windows such as window:lung;soft-tissue;bone, percentile:0.5,99.5, min-max or "
    "eight-bit"
)
OFFSET_FORMS = "auto, none, wrapped or a number that was added, such as 1024 or 32768"
LEAST_TILE = 8  # pixels
