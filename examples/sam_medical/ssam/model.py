"""SAM prompted with the names of labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam.backbones import Backbone


class TextAffineLayer(nn.Module):
    """Text embeddings (K, D) to prompt tokens (K, 256): one learned layer, the paper's TAL.

    Normalised token by token (the published code does it over the batch), so that a token depends on its own label
    alone.
    """

    def __init__(self, text_width: int, prompt_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_width, prompt_width)
        self.norm = nn.LayerNorm(prompt_width)

    def forward(self, text_embeddings: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(text_embeddings)))


class TextPromptedSam(nn.Module):
    """An image and K label names in, K masks out; the image is encoded once.

    The decoder is prompted with one token a label, and with what the frozen prompt encoder makes of no mask and, for
    some backbones, of a box around the whole image: nothing that a person would have to give.

    Shape legend: B images, K labels, S image side, h w the encoder's grid, D width of the text embeddings.
    """

    position_of_pixels: Tensor
    common_prompts: Tensor

    def __init__(self, backbone: Backbone, text_width: int) -> None:
        super().__init__()
        self.pixels = backbone.pixels
        self.image_encoder = backbone.image_encoder
        self.prompt_encoder = backbone.prompt_encoder
        self.mask_decoder = backbone.mask_decoder
        self.text_affine = TextAffineLayer(text_width, backbone.prompt_encoder.hidden_size)
        self.register_buffer("position_of_pixels", self._encode_grid(), persistent=False)
        common_prompts = self._encode_whole_image_box(backbone.image_size if backbone.whole_image_box else 0)
        self.register_buffer("common_prompts", common_prompts, persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Mask logits (B, K, S, S) from images (B, 3, S, S) between zero and one and text embeddings (K, D)."""
        image_embeddings = self.image_encoder(self.pixels(images))
        prompts = self.text_affine(text_embeddings)
        mask_logits = self.decode(image_embeddings, prompts)
        return F.interpolate(mask_logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def decode(self, image_embeddings: Tensor, prompts: Tensor) -> Tensor:
        """Mask logits (B, K, 4h, 4w) from image embeddings (B, 256, h, w) and prompt tokens (K, 256)."""
        batch = len(image_embeddings)
        _, no_mask = self.prompt_encoder(None, None, None, None)
        common_prompts = self.common_prompts.expand(len(prompts), -1, -1)
        prompts = torch.cat([prompts[:, None], common_prompts.to(prompts.dtype)], dim=1)
        mask_logits, _ = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.position_of_pixels.expand(batch, -1, -1, -1),
            sparse_prompt_embeddings=prompts.expand(batch, -1, -1, -1),
            dense_prompt_embeddings=no_mask.expand(batch, -1, -1, -1),
            multimask_output=False,
        )
        return mask_logits.squeeze(2)

    @torch.no_grad()
    def _encode_whole_image_box(self, image_size: int) -> Tensor:
        """The tokens of a box around an image of that size, (2, 256); of no box, (0, 256), if it is 0."""
        if not image_size:
            return torch.zeros(0, self.prompt_encoder.hidden_size)
        box = torch.tensor([[[0.0, 0.0, image_size, image_size]]])
        tokens, _ = self.prompt_encoder(None, None, box, None)
        return tokens[0, 0]

    @torch.no_grad()
    def _encode_grid(self) -> Tensor:
        """SAM's encoding of each grid cell's centre, (1, 256, h, w)."""
        height, width = self.prompt_encoder.image_embedding_size
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return self.prompt_encoder.shared_embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]
