"""SAM, prompted in any of the ways of `sam_medical.models.prompts`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_medical.models.backbones import Backbone
from sam_medical.models.prompts import Prompting, Prompts

# Where there was no prompt, so that its sigmoid is 0 in float16, too.
NO_MASK_LOGIT = -20.0


class PromptedSam(nn.Module):
    """An image in, K masks out; the image is encoded once.

    Beside its prompts the decoder gets what the frozen prompt encoder makes of no mask and, for some backbones, of a
    box around the whole image: nothing that a person would have to give.

    Shape legend: B images, K labels, S image side, h w the encoder's grid.
    """

    position_of_pixels: Tensor
    common_tokens: Tensor

    def __init__(self, backbone: Backbone, prompts: Prompting) -> None:
        super().__init__()
        self.pixels = backbone.pixels
        self.image_encoder = backbone.image_encoder
        self.prompt_encoder = backbone.prompt_encoder
        self.mask_decoder = backbone.mask_decoder
        self.prompts = prompts
        # SAM's decoder can give several masks for one prompt; a method may let each of them stand for a label.
        self.a_mask_a_label = False
        self.register_buffer("position_of_pixels", self._encode_grid(), persistent=False)
        whole_image_box = backbone.whole_image_box and prompts.needs_box
        common_tokens = self._encode_whole_image_box(backbone.image_size if whole_image_box else 0)
        self.register_buffer("common_tokens", common_tokens, persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, true_masks: Tensor | None = None) -> Tensor:
        """Mask logits (B, K, S, S) from images (B, 3, S, S) between zero and one.

        Args:
            images: As the loaders give them.
            true_masks: (B, K, S, S), for prompts that an expert gives; others do not look at them.
        """
        image_embeddings = self.image_encoder(self.pixels(images))
        prompts = self.prompts(images, true_masks, self.prompt_encoder)
        mask_logits = self.decode(image_embeddings, prompts)
        mask_logits = F.interpolate(mask_logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        if prompts.given is None:
            return mask_logits
        return mask_logits.masked_fill(~prompts.given[..., None, None], NO_MASK_LOGIT)

    def decode(self, image_embeddings: Tensor, prompts: Prompts) -> Tensor:
        """Mask logits (B, K, 4h, 4w) from image embeddings (B, 256, h, w) and their prompts."""
        batch, count = prompts.tokens.shape[:2]
        common_tokens = self.common_tokens.to(prompts.tokens.dtype).expand(batch, count, -1, -1)
        tokens = torch.cat([prompts.tokens, common_tokens], dim=2)
        if prompts.dense is None:
            _, dense = self.prompt_encoder(None, None, None, None)
            dense = dense.expand(batch, -1, -1, -1)
        else:
            # The decoder takes one dense prompt an image, so that each label's becomes an image of its own.
            image_embeddings = image_embeddings.repeat_interleave(count, dim=0)
            tokens, dense = tokens.flatten(0, 1)[:, None], prompts.dense.flatten(0, 1)
        mask_logits, _ = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.position_of_pixels.expand(len(image_embeddings), -1, -1, -1),
            sparse_prompt_embeddings=tokens,
            dense_prompt_embeddings=dense,
            multimask_output=self.a_mask_a_label,
        )
        return mask_logits.reshape(batch, -1, *mask_logits.shape[-2:])

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
