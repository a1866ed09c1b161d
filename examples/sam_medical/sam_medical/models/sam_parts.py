"""Backbones with SAM's own prompt encoder and mask decoder, in transformers' implementation."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from sam_medical.models.backbone import Backbone, LayerPatterns
from sam_medical.models.prompts import Prompter, Prompts


class SamParts(Backbone):
    """An image encoder before SAM's prompt encoder and mask decoder.

    Beside its prompts the decoder gets what the frozen prompt encoder computes for no mask and, for a decoder that was
    trained with boxes only, for a box around the whole image: without one such a decoder gives blank masks.

    Args:
        name: As for `Backbone`.
        image_size: As for `Backbone`.
        pixels: Maps images between zero and one to what the encoder was trained on.
        image_encoder: (B, 3, S, S) to image embeddings (B, 256, h, w).
        prompt_encoder: With the weights of the pretrained model.
        mask_decoder: With the weights of the pretrained model.
        stride: Of the image encoder, S / h.
    """

    prompt_encoder: SamPromptEncoder
    mask_decoder: SamMaskDecoder
    position_of_pixels: Tensor
    common_tokens: Tensor
    patterns = LayerPatterns(
        encoder_attention=r"image_encoder\.layers\..*attn\.proj",
        encoder_mlp=r"image_encoder\.layers\..*\.mlp",
        decoder_attention=r"mask_decoder\.transformer\.layers\.\d+\.cross_attn_\w+\.out_proj",
        decoder_mlp=r"mask_decoder\.transformer\.layers\.\d+\.mlp",
    )
    whole_image_box = False

    def __init__(
        self,
        name: str,
        image_size: int,
        pixels: nn.Module,
        image_encoder: nn.Module,
        prompt_encoder: SamPromptEncoder,
        mask_decoder: SamMaskDecoder,
        stride: int,
    ) -> None:
        super().__init__()
        self.name, self.image_size = name, image_size
        self.pixels = pixels
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        prompt_encoder.image_embedding_size = (image_size // stride, image_size // stride)
        self.register_buffer("position_of_pixels", self._encode_grid(), persistent=False)
        self.register_buffer("common_tokens", torch.zeros(0, self.prompt_width), persistent=False)

    @property
    def prompt_width(self) -> int:
        return self.prompt_encoder.hidden_size

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.prompt_encoder.image_embedding_size
        return height, width

    def prompt_with(self, prompts: Prompter, mask_per_label: int | None = None) -> Backbone:
        if self.whole_image_box and prompts.needs_box:
            self.common_tokens = self._whole_image_box()
        return super().prompt_with(prompts, mask_per_label)

    def encode(self, images: Tensor) -> Tensor:
        return self.image_encoder(self.pixels(images))

    def embed_points(self, points: Tensor) -> Tensor:
        # From the middle of a pixel of the image to the middle of one of the prompt encoder's, which adds a half.
        points = self._in_prompt_pixels(points + 0.5) - 0.5
        side = self.prompt_encoder.input_image_size
        box = points.new_tensor([0, 0, side, side]).expand(*points.shape[:2], 4) if self.whole_image_box else None
        is_inside = torch.ones_like(points[..., :1], dtype=torch.int)
        tokens, _ = self.prompt_encoder(points[:, :, None], is_inside, box, None)
        return tokens

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        tokens, _ = self.prompt_encoder(None, None, self._in_prompt_pixels(boxes), None)
        return tokens

    def decode(self, image_embeddings: Tensor, prompts: Prompts) -> Tensor:
        """Mask logits (B, K, 4h, 4w) of image embeddings (B, 256, h, w) and their prompts."""
        batch, count = prompts.tokens.shape[:2]
        common_tokens = self.common_tokens.to(prompts.tokens.dtype).expand(batch, count, -1, -1)
        tokens = torch.cat([prompts.tokens, common_tokens], dim=2)
        if prompts.dense is None:
            _, dense = self.prompt_encoder(None, None, None, None)
            dense = dense.expand(batch, -1, -1, -1)
        else:
            # The decoder takes one dense prompt per image, so each label becomes an image of its own.
            image_embeddings = image_embeddings.repeat_interleave(count, dim=0)
            tokens, dense = tokens.flatten(0, 1)[:, None], prompts.dense.flatten(0, 1)
        logits, _ = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.position_of_pixels.expand(len(image_embeddings), -1, -1, -1),
            sparse_prompt_embeddings=tokens,
            dense_prompt_embeddings=dense,
            multimask_output=self.mask_per_label,
        )
        return logits.reshape(batch, -1, *logits.shape[-2:])

    def give_mask_per_label(self, labels: int) -> None:
        self.mask_decoder = decoder_with_masks(self.mask_decoder, labels)

    def prompt_encoder_parts(self) -> list[str]:
        corners = ("point_embed.2", "point_embed.3") if self.whole_image_box else ("not_a_point_embed",)
        return [f"prompt_encoder.{name}" for name in ("point_embed.1", *corners, "no_mask_embed")]

    def default_prompt_parts(self) -> list[str]:
        return ["prompt_encoder.no_mask_embed"]

    def mask_decoder_parts(self) -> list[str]:
        """The decoder without what no loss reaches: its estimate of quality, and masks that are not asked for."""
        heads = "output_hypernetworks_mlps"
        names = [name for name, _ in self.mask_decoder.named_children()]
        masks = range(len(self.mask_decoder.output_hypernetworks_mlps))
        used = masks[1:] if self.mask_per_label else masks[:1]
        names = [name for name in names if name not in ("iou_prediction_head", heads)]
        return [f"mask_decoder.{name}" for name in [*names, *(f"{heads}.{mask}" for mask in used)]]

    def is_resized(self, tensor_name: str) -> bool:
        return "pos" in tensor_name

    def _in_prompt_pixels(self, coordinates: Tensor) -> Tensor:
        """From pixels of the image to pixels of the size that the prompt encoder counts in."""
        return coordinates * (self.prompt_encoder.input_image_size / self.image_size)

    @torch.no_grad()
    def _whole_image_box(self) -> Tensor:
        """The tokens (2, 256) of a box around the whole image."""
        box = torch.tensor([[[0.0, 0.0, self.image_size, self.image_size]]])
        tokens, _ = self.prompt_encoder(None, None, box, None)
        return tokens[0, 0]

    @torch.no_grad()
    def _encode_grid(self) -> Tensor:
        """SAM's encoding of each grid cell's centre, (1, 256, h, w)."""
        height, width = self.grid
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return self.prompt_encoder.shared_embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]


def decoder_with_masks(decoder: SamMaskDecoder, masks: int) -> SamMaskDecoder:
    """A copy of a mask decoder that gives this many masks per prompt, started from its own three in turn."""
    config = type(decoder.config).from_dict({**decoder.config.to_dict(), "num_multimask_outputs": masks})
    config._attn_implementation = decoder.config._attn_implementation
    wider = SamMaskDecoder(config)
    source = [0, *(1 + k % (decoder.num_mask_tokens - 1) for k in range(masks))]
    old = decoder.state_dict()
    new = {}
    for name in wider.state_dict():
        if match := re.match(r"(output_hypernetworks_mlps\.)(\d+)(\..*)", name):
            new[name] = old[f"{match[1]}{source[int(match[2])]}{match[3]}"]
        elif name == "mask_tokens.weight" or name.startswith("iou_prediction_head.proj_out."):
            new[name] = old[name][source]
        else:
            new[name] = old[name]
    wider.load_state_dict(new)
    return wider.requires_grad_(False)
