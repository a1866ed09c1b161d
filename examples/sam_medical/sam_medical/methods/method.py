"""A method as data: what is put into the model, what is trained whole, and what prompts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from sam_medical.models.backbones import PositionalEmbedding
from sam_medical.models.lite_medsam import RelativePositionBias
from sam_medical.models.prompted_sam import PromptedSam
from sam_medical.models.prompts import LearnedPrompts

POSITION_TYPES = (PositionalEmbedding, RelativePositionBias)


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
