"""The seam for backbones: what a pretrained promptable segmenter must offer to the methods, and how one is found.

To add a backbone, subclass `Backbone` in one file, and name the class to the commands as ``package.module:CLASS``, or
register it in `sam_medical.models.BACKBONES`. `tests/sam_medical/test_backbone_contract.py` states the contract.

Shape legend: B images, K labels, P prompts per image, n tokens per prompt, S image side, C prompt width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_medical.common.errors import UserError, first_line
from sam_medical.models.prompts import Prompter, Prompts

# Where there is no prompt. Its sigmoid is 0 in float16, too.
NO_MASK_LOGIT = -20.0

# Parts of a model that a method can train whole.
Part = Literal["norms", "positions", "prompts", "image encoder", "prompt encoder", "default prompt", "mask decoder"]


class QueryAndValueRows(NamedTuple):
    """The rows of one linear layer's weight that make an attention's queries, and those that make its values."""

    queries: Tensor
    values: Tensor


class LayerPatterns(NamedTuple):
    """Regular expressions of layers by their role, each matched against a module's full name.

    Attributes:
        encoder_attention: The output projections of the image encoder's attentions.
        encoder_mlp: The image encoder's MLPs.
        decoder_attention: The output projections of the decoder's attentions between tokens and image.
        decoder_mlp: The decoder's MLPs.
    """

    encoder_attention: str
    encoder_mlp: str
    decoder_attention: str
    decoder_mlp: str


class Backbone(nn.Module, ABC):
    """A pretrained model that segments what it is prompted for, at one image size, and what prompts it.

    Images are encoded once, whatever the number of labels. The keys of saved adapters begin with the names of the
    modules below, so a subclass keeps them.

    Attributes:
        name: What the user asked for: a registered name, a hub name, a folder or a file.
        image_size: Side S of the square image, in pixels.
        image_encoder: The module that `encode` calls.
        prompt_encoder, mask_decoder: The modules behind the prompts and the masks.
        prompts: What makes the prompts; set by `prompt_with`.
        target_modules: Regular expression of the layers that S-SAM tunes.
        patterns: Expressions of layers by their role, for methods that insert modules there.
        position_types: Types of the encoder's modules that hold learned positions.
        mask_per_label: Whether the decoder gives one mask per label for a single prompt, and not one per prompt.
    """

    name: str
    image_size: int
    image_encoder: nn.Module
    prompt_encoder: nn.Module
    mask_decoder: nn.Module
    prompts: Prompter
    target_modules: str
    patterns: ClassVar[LayerPatterns]
    position_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    mask_per_label = False

    @classmethod
    @abstractmethod
    def load(cls, name: str, image_size: int) -> Backbone:
        """The pretrained model that ``name`` stands for.

        Raises:
            UserError: if the weights are not there, are of another model, or do not fit the image size.
        """

    @property
    @abstractmethod
    def prompt_width(self) -> int:
        """Width C of a prompt token."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Height and width of the image embeddings."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Image embeddings of images (B, 3, S, S) between zero and one."""

    @abstractmethod
    def embed_points(self, points: Tensor) -> Tensor:
        """Prompt tokens (B, P, n, C) of one point (x, y) per prompt, (B, P, 2), in pixels of the image."""

    @abstractmethod
    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Prompt tokens (B, P, n, C) of boxes (left, top, right, bottom), (B, P, 4), in pixels of the image."""

    @abstractmethod
    def decode(self, image_embeddings: Tensor, prompts: Prompts) -> Tensor:
        """Mask logits (B, K, h, w), of any size h x w."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The encoder's blocks, of which only the inputs are kept under gradient checkpointing."""

    @abstractmethod
    def query_and_value_rows(self) -> dict[str, QueryAndValueRows]:
        """For each layer of the encoder that computes queries or values, by its name, the rows of its weight."""

    @abstractmethod
    def give_mask_per_label(self, labels: int) -> None:
        """Lets the decoder give one mask per label for a single prompt, starting from the masks that it has."""

    @abstractmethod
    def prompt_encoder_parts(self) -> list[str]:
        """Names of the prompt encoder's modules that a point goes through."""

    @abstractmethod
    def default_prompt_parts(self) -> list[str]:
        """Names of the modules that stand for a prompt that is not given."""

    @abstractmethod
    def mask_decoder_parts(self) -> list[str]:
        """Names of the decoder's modules that the masks depend on, as `mask_per_label` has it."""

    def prompt_with(self, prompts: Prompter, mask_per_label: int | None = None) -> Backbone:
        """Sets what prompts the model, and freezes everything; returns the model.

        Args:
            prompts: Makes the prompts.
            mask_per_label: The number of labels, if a single prompt is to give a mask for each.
        """
        self.prompts = prompts
        if mask_per_label is not None:
            self.give_mask_per_label(mask_per_label)
            self.mask_per_label = True
        self.requires_grad_(False)
        return self

    def forward(self, images: Tensor, true_masks: Tensor | None = None) -> Tensor:
        """Mask logits (B, K, S, S) of images (B, 3, S, S) between zero and one.

        Args:
            images: As the loaders give them.
            true_masks: (B, K, S, S), for prompts that an expert gives; other prompts ignore them.
        """
        image_embeddings = self.encode(images)
        prompts = self.prompts(images, true_masks, self)
        logits = self.decode(image_embeddings, prompts)
        logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        if prompts.given is None:
            return logits
        return logits.masked_fill(~prompts.given[..., None, None], NO_MASK_LOGIT)

    def names_of(self, parts: Sequence[Part]) -> list[str]:
        """The names of the modules that make up these parts, in the order of the parts.

        Raises:
            ValueError: if there is no such part.
        """
        return [name for part in parts for name in self._names_of(part)]

    def _names_of(self, part: Part) -> list[str]:
        if part == "norms":
            return self._encoder_modules(nn.LayerNorm)
        if part == "positions":
            return self._encoder_modules(*self.position_types)
        if part == "prompts":
            return [f"prompts.{name}".removesuffix(".") for name in self.prompts.learned_modules]
        if part == "image encoder":
            return ["image_encoder"]
        if part == "prompt encoder":
            return self.prompt_encoder_parts()
        if part == "default prompt":
            return self.default_prompt_parts()
        if part == "mask decoder":
            return self.mask_decoder_parts()
        raise ValueError(f"a model has no part {part!r}")

    def _encoder_modules(self, *types: type[nn.Module]) -> list[str]:
        modules = self.image_encoder.named_modules()
        return [f"image_encoder.{name}" for name, module in modules if isinstance(module, types)]

    def is_position(self, module: nn.Module, parameter_name: str) -> bool:
        """Whether a module's own parameter holds learned positions, which weight decay leaves alone."""
        return isinstance(module, self.position_types)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that identify the pretrained weights.

        Resized tensors are left out, because resizing rounds differently from machine to machine.
        """
        digest = hashlib.sha256()
        for part in (self.image_encoder, self.prompt_encoder, self.mask_decoder):
            for name, tensor in part.state_dict().items():
                if not self.is_resized(name):
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def is_resized(self, tensor_name: str) -> bool:
        """Whether a tensor of the image encoder, prompt encoder or decoder depends on the image size."""
        return False


def check_image_size(image_size: int, stride: int, name: str) -> None:
    """Raises a `UserError` unless the stride of a backbone divides the image size."""
    if image_size <= 0 or image_size % stride:
        raise UserError(f"image_size {image_size} does not fit {name}: it must be a positive multiple of {stride}.")


def no_such_model(name: str, error: Exception) -> UserError:
    """The error for a name that is neither a folder nor on the hub."""
    return UserError(
        f"there is no SAM model {name!r}, neither as a folder nor on the hub ({first_line(error)}). "
        "Give lite-medsam, a hub name such as facebook/sam-vit-base, a folder or a checkpoint file."
    )


def checkpoint_blocks(model: nn.Module) -> None:
    """Keeps only the inputs of the encoder's blocks in training, and recomputes the rest in the backward pass."""
    for module in model.modules():
        if isinstance(module, Backbone):
            for block in module.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
