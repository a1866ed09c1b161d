"""LoRA (arXiv:2106.09685), PEFT's own, on the layers that S-SAM tunes."""

from __future__ import annotations

from collections.abc import Callable

from peft import LoraConfig

from sam_medical.methods.method import Method
from sam_medical.methods.s_sam import PARTS
from sam_medical.methods.tuners import PeftTuner
from sam_medical.models.backbone import Backbone


def lora(rank: int) -> Callable[[Backbone, str], LoraConfig]:
    return lambda backbone, target_modules: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules)


def _lora_method(rank: int) -> Method:
    return Method(
        f"LoRA r={rank}",
        "LoRA (arXiv:2106.09685), on the layers that S-SAM tunes",
        tuner=PeftTuner(lora(rank), PARTS),
        departs="norms, positions and text affine layer learn as S-SAM's",
        learning_rate=2e-3,
    )


LORA = _lora_method(8)
LORA_R1 = _lora_method(1)
LORA_R2 = _lora_method(2)
