"""Every method on the bench, as data: what is put into the model, what is trained whole, and what prompts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from sam_medical.methods.insertions import insert_bottlenecks, insert_salt, insert_samed
from sam_medical.models.backbones import PositionalEmbedding
from sam_medical.models.lite_medsam import RelativePositionBias
from sam_medical.models.prompted_sam import PromptedSam
from sam_medical.models.prompts import LearnedPrompts
from svdtune import SVDScaleShiftConfig

POSITION_TYPES = (PositionalEmbedding, RelativePositionBias)
LATE_SHARE = 1 / 3


@dataclass(frozen=True)
class Method:
    """One way to segment.

    Attributes:
        title: As tables and plots name it.
        source: Where it comes from.
        departs: What is otherwise than in the source; empty if nothing is.
        network: A network of `sam_medical.models.networks` that is trained from nothing; None for SAM.
        prompts: What SAM's decoder is prompted with: "text", "none", "image", "point" or "box".
        adapter: From the model and the expression of the encoder's layers, PEFT's configuration.
        insert: Puts into the model what PEFT has no configuration for; gets the number of labels, too.
        inserts_at_targets: Whether it does so at the layers of the expression.
        trained: Parts of the model that are trained whole; see `PARTS`.
        biases: Whether the encoder's biases are trained.
        loss: A loss of `sam_medical.training.losses`.
        learning_rate: The peak, where none is given.
    """

    title: str
    source: str
    departs: str = ""
    network: str | None = None
    prompts: str = "text"
    adapter: Callable[[PromptedSam, str], PeftConfig] | None = None
    insert: Callable[[PromptedSam, int, str], None] | None = None
    inserts_at_targets: bool = False
    trained: tuple[str, ...] = ()
    biases: bool = False
    loss: str = "focal-dice"
    learning_rate: float = 5e-3

    @property
    def is_sam(self) -> bool:
        return self.network is None

    @property
    def needs_text(self) -> bool:
        return self.is_sam and self.prompts == "text"

    @property
    def needs_expert(self) -> bool:
        """Whether somebody must point at what is to be segmented, in every image."""
        return self.prompts in ("point", "box")

    @property
    def learns(self) -> bool:
        return bool(self.network or self.adapter or self.insert or self.trained or self.biases)

    @property
    def is_random(self) -> bool:
        """Whether a seed makes a difference: also to text prompts that do not learn, whose layer is random."""
        return self.learns or self.needs_text

    @property
    def takes_target_modules(self) -> bool:
        return self.adapter is not None or self.inserts_at_targets


def _encoder_modules(*types: type[nn.Module]) -> Callable[[PromptedSam], list[str]]:
    def find(model: PromptedSam) -> list[str]:
        modules = model.image_encoder.named_modules()
        return [f"image_encoder.{name}" for name, module in modules if isinstance(module, types)]

    return find


def _used_decoder_modules(model: PromptedSam) -> list[str]:
    """The mask decoder without what no loss depends on: its estimate of quality, and masks that are not asked for."""
    names = [name for name, _ in model.mask_decoder.named_children()]
    unused = ("iou_prediction_head", "output_hypernetworks_mlps")
    masks = range(len(model.mask_decoder.output_hypernetworks_mlps))
    asked_for = masks[1:] if model.a_mask_a_label else masks[:1]
    names = [name for name in names if name not in unused]
    return [f"mask_decoder.{name}" for name in [*names, *(f"{unused[1]}.{mask}" for mask in asked_for)]]


def _used_prompt_modules(model: PromptedSam) -> list[str]:
    """Of the prompt encoder, what a point inside a label goes through, and the box around the image beside it."""
    in_box = getattr(model.prompts, "in_box", False)
    names = ["point_embed.1", *(("point_embed.2", "point_embed.3") if in_box else ("not_a_point_embed",))]
    return [f"prompt_encoder.{name}" for name in [*names, "no_mask_embed"]]


PARTS: dict[str, Callable[[PromptedSam], list[str]]] = {
    "norms": _encoder_modules(nn.LayerNorm),
    "positions": _encoder_modules(*POSITION_TYPES),
    "text affine": lambda model: [
        "prompts.tokens" if isinstance(model.prompts, LearnedPrompts) else "prompts.text_affine"
    ],
    "image prompts": lambda model: ["prompts"],
    "image encoder": lambda model: ["image_encoder"],
    "prompt encoder": _used_prompt_modules,
    "default prompt": lambda model: ["prompt_encoder.no_mask_embed"],
    "mask decoder": _used_decoder_modules,
}

WITH_ENCODER = ("norms", "positions", "text affine")


def names_in(model: PromptedSam, parts: tuple[str, ...]) -> list[str]:
    """The names of the modules that make up these parts."""
    return [name for part in parts for name in PARTS[part](model)]


def svd(**choices: Any) -> Callable[[PromptedSam, str], PeftConfig]:
    return lambda model, target_modules: SVDScaleShiftConfig(target_modules=target_modules, **choices)


def lora(rank: int) -> Callable[[PromptedSam, str], PeftConfig]:
    return lambda model, target_modules: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules)


def late_svd(model: PromptedSam, target_modules: str) -> PeftConfig:
    """Scale and shift in the last third of the layers alone."""
    names = [name for name, _ in model.named_modules() if re.fullmatch(target_modules, name)]
    return SVDScaleShiftConfig(target_modules=names[-round(LATE_SHARE * len(names)) :])


SSAM = "S-SAM (arXiv:2408.06447)"
LORA = "LoRA (arXiv:2106.09685), on the layers that S-SAM tunes"
AS_SSAM = "norms, positions and text affine layer learn as S-SAM's"

METHODS: dict[str, Method] = {
    "s-sam": Method("S-SAM", SSAM, adapter=svd(), trained=WITH_ENCODER),
    "s-sam-late": Method(
        "S-SAM, last third", f"{SSAM}, tuned in the last blocks", adapter=late_svd, trained=WITH_ENCODER
    ),
    "salt": Method(
        "SALT",
        "SALT (arXiv:2503.16055)",
        departs="a quarter of the singular values and rank 4; norms, positions and text affine layer as S-SAM's",
        insert=insert_salt,
        inserts_at_targets=True,
        trained=WITH_ENCODER,
        learning_rate=2e-3,
    ),
    "lora": Method("LoRA r=8", LORA, AS_SSAM, adapter=lora(8), trained=WITH_ENCODER, learning_rate=2e-3),
    "lora-r1": Method("LoRA r=1", LORA, AS_SSAM, adapter=lora(1), trained=WITH_ENCODER, learning_rate=2e-3),
    "lora-r2": Method("LoRA r=2", LORA, AS_SSAM, adapter=lora(2), trained=WITH_ENCODER, learning_rate=2e-3),
    "samed": Method(
        "SAMed",
        "SAMed (arXiv:2304.13785)",
        departs="no softmax over labels and background, since labels may overlap",
        prompts="none",
        insert=insert_samed,
        trained=("mask decoder", "default prompt"),
        learning_rate=2e-3,
    ),
    "adaptive-sam": Method(
        "AdaptiveSAM",
        "AdaptiveSAM (arXiv:2308.03726)",
        trained=(*WITH_ENCODER, "mask decoder"),
        biases=True,
        learning_rate=1e-3,
    ),
    "medical-sam-adapter": Method(
        "Medical SAM Adapter",
        "Medical SAM Adapter (arXiv:2304.12620)",
        departs="prompted with the label's name; no click to make the decoder's bottlenecks from, and no volumes",
        insert=insert_bottlenecks,
        trained=("text affine",),
        learning_rate=1e-3,
    ),
    "auto-sam": Method(
        "AutoSAM",
        "AutoSAM (arXiv:2306.06370)",
        departs="a U-Net makes the prompt in place of a HarDNet",
        prompts="image",
        trained=("image prompts",),
        learning_rate=1e-3,
    ),
    "sono-sam": Method(
        "SonoSAM",
        "SonoSAM (arXiv:2310.16872)",
        departs="one point, without its rounds of corrections, and no distillation",
        prompts="point",
        trained=("prompt encoder", "mask decoder"),
        learning_rate=1e-3,
    ),
    "full-fine-tuning": Method(
        "full fine-tuning",
        "all of SAM, prompted with the label's name",
        trained=("image encoder", "default prompt", "mask decoder", "text affine"),
        learning_rate=2e-4,
    ),
    "zero-shot-text": Method("zero-shot, text", "SAM with an untrained text affine layer"),
    "zero-shot-point": Method(
        "zero-shot, point",
        "SAM with a point in each label",
        departs="one point for all of a label's parts in an image",
        prompts="point",
    ),
    "zero-shot-box": Method(
        "zero-shot, box",
        "SAM with the box around each label",
        departs="one box around all of a label's parts in an image",
        prompts="box",
    ),
    "u-net": Method("U-Net", "U-Net (arXiv:1505.04597), MONAI's", network="u-net", learning_rate=2e-3),
    "u-net-cldice": Method(
        "U-Net, clDice", "clDice (arXiv:2003.07311), MONAI's", network="u-net", loss="dice-cldice", learning_rate=2e-3
    ),
    "unetr": Method("UNETR", "UNETR (arXiv:2103.10504), MONAI's", network="unetr", learning_rate=5e-4),
    "deeplab-v3-plus": Method(
        "DeepLab v3+",
        "DeepLab v3+ (arXiv:1802.02611), on transformers' MobileNetV2",
        network="deeplab-v3-plus",
        learning_rate=2e-3,
    ),
    "segnet": Method("SegNet", "SegNet (arXiv:1511.00561)", network="segnet", learning_rate=2e-3),
    # The paper's Table 3: each row adds one thing to S-SAM's frozen start.
    "ablation-positions": Method("positions", f"{SSAM}, Table 3", trained=("positions",)),
    "ablation-norms": Method("positions, norms", f"{SSAM}, Table 3", trained=("positions", "norms")),
    "ablation-text": Method("positions, text affine", f"{SSAM}, Table 3", trained=("positions", "text affine")),
    "ablation-scale": Method(
        "positions, text affine, scale",
        f"{SSAM}, Table 3",
        adapter=svd(shift=False),
        trained=("positions", "text affine"),
    ),
    "ablation-shift": Method(
        "positions, text affine, shift",
        f"{SSAM}, Table 3",
        adapter=svd(scale=False),
        trained=("positions", "text affine"),
    ),
    "ablation-no-norms": Method(
        "positions, text affine, scale, shift",
        f"{SSAM}, without norms",
        adapter=svd(),
        trained=("positions", "text affine"),
    ),
}
