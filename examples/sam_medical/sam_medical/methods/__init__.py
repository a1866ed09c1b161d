"""Fine-tuning methods: what each one puts into a model, what learns, and what of it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sam_medical.common.registry import Registry

if TYPE_CHECKING:
    from sam_medical.methods.method import Method

METHODS: Registry[Method] = Registry(
    "method",
    {
        "s-sam": "sam_medical.methods.s_sam:S_SAM",
        "s-sam-late": "sam_medical.methods.s_sam:S_SAM_LATE",
        "salt": "sam_medical.methods.salt:SALT",
        "lora": "sam_medical.methods.lora:LORA",
        "lora-r1": "sam_medical.methods.lora:LORA_R1",
        "lora-r2": "sam_medical.methods.lora:LORA_R2",
        "samed": "sam_medical.methods.samed:SAMED",
        "adaptive-sam": "sam_medical.methods.adaptive_sam:ADAPTIVE_SAM",
        "medical-sam-adapter": "sam_medical.methods.medical_sam_adapter:MEDICAL_SAM_ADAPTER",
        "auto-sam": "sam_medical.methods.auto_sam:AUTO_SAM",
        "sono-sam": "sam_medical.methods.sono_sam:SONO_SAM",
        "full-fine-tuning": "sam_medical.methods.full_fine_tuning:FULL_FINE_TUNING",
        "zero-shot-text": "sam_medical.methods.zero_shot:ZERO_SHOT_TEXT",
        "zero-shot-point": "sam_medical.methods.zero_shot:ZERO_SHOT_POINT",
        "zero-shot-box": "sam_medical.methods.zero_shot:ZERO_SHOT_BOX",
        "u-net": "sam_medical.methods.from_scratch:U_NET",
        "u-net-cldice": "sam_medical.methods.from_scratch:U_NET_CLDICE",
        "unetr": "sam_medical.methods.from_scratch:UNETR",
        "deeplab-v3-plus": "sam_medical.methods.from_scratch:DEEPLAB_V3_PLUS",
        "segnet": "sam_medical.methods.from_scratch:SEGNET",
        "ablation-positions": "sam_medical.methods.ablations:POSITIONS",
        "ablation-norms": "sam_medical.methods.ablations:NORMS",
        "ablation-text": "sam_medical.methods.ablations:TEXT",
        "ablation-scale": "sam_medical.methods.ablations:SCALE",
        "ablation-shift": "sam_medical.methods.ablations:SHIFT",
        "ablation-no-norms": "sam_medical.methods.ablations:NO_NORMS",
    },
    has="learns",
)
