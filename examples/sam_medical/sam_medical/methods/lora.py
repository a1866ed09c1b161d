"""LoRA (arXiv:2106.09685), PEFT's own, on the layers that S-SAM tunes."""

from __future__ import annotations

from collections.abc import Callable

from peft import LoraConfig, PeftConfig

from sam_medical.methods.method import WITH_ENCODER, Method
from sam_medical.models.prompted_sam import PromptedSam

SOURCE = "LoRA (arXiv:2106.09685), on the layers that S-SAM tunes"
DEPARTS = "norms, positions and text affine layer learn as S-SAM's"


def lora(rank: int) -> Callable[[PromptedSam, str], PeftConfig]:
    return lambda model, target_modules: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules)


LORA = Method("LoRA r=8", SOURCE, DEPARTS, adapter=lora(8), trained=WITH_ENCODER, learning_rate=2e-3)


LORA_R1 = Method("LoRA r=1", SOURCE, DEPARTS, adapter=lora(1), trained=WITH_ENCODER, learning_rate=2e-3)


LORA_R2 = Method("LoRA r=2", SOURCE, DEPARTS, adapter=lora(2), trained=WITH_ENCODER, learning_rate=2e-3)
