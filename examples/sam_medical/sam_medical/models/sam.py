"""SAM itself: its ViT encoder at any image size, from transformers or a segment-anything checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder

from sam_medical.common.errors import UserError, first_line
from sam_medical.models.backbone import QueryAndValueRows, check_image_size, no_such_model
from sam_medical.models.pixels import ImagenetNormalization
from sam_medical.models.sam_checkpoint import sam_model_from_checkpoint
from sam_medical.models.sam_parts import SamParts


class PositionalEmbedding(nn.Module):
    """Adds a learned table (1, h, w, C) to patch embeddings (B, h, w, C)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(table)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight


class Sam(SamParts):
    """SAM with a ViT encoder (arXiv:2304.02643), its positions resized to the image size."""

    target_modules = r"image_encoder\.(layers\..*\.(qkv|proj|lin1|lin2)|neck\.conv[12])"
    position_types = (PositionalEmbedding,)
    image_encoder: SamImageEncoder

    @classmethod
    def load(cls, name: str, image_size: int) -> Sam:
        path = Path(name)
        model = sam_model_from_checkpoint(path) if path.is_file() else load_sam_model(name)
        return cls.of(model, name, image_size)

    @classmethod
    def of(cls, model: SamModel, name: str, image_size: int) -> Sam:
        """The parts of a `SamModel`, its position tables resized to the image size."""
        patch = model.vision_encoder.patch_embed.patch_size[0]
        check_image_size(image_size, patch, name)
        encoder = SamImageEncoder(model.vision_encoder, image_size)
        return cls(
            name, image_size, ImagenetNormalization(), encoder, model.prompt_encoder, model.mask_decoder, stride=patch
        )

    def blocks(self) -> Iterable[nn.Module]:
        return self.image_encoder.layers

    def query_and_value_rows(self) -> dict[str, QueryAndValueRows]:
        names = [name for name, _ in self.named_modules() if name.endswith(".qkv")]
        return {name: self._rows(self.get_submodule(name)) for name in names}

    @staticmethod
    def _rows(qkv: nn.Module) -> QueryAndValueRows:
        """All queries come first, then the keys, then the values."""
        queries, _, values = torch.arange(cast(nn.Linear, qkv).out_features).chunk(3)
        return QueryAndValueRows(queries, values)

    def is_position(self, module: nn.Module, parameter_name: str) -> bool:
        return super().is_position(module, parameter_name) or parameter_name.startswith("rel_pos")


class SamImageEncoder(nn.Module):
    """SAM's ViT encoder at any image size: (B, 3, S, S) to (B, 256, S / 16, S / 16).

    The absolute positions become a module of their own, so that PEFT's ``modules_to_save`` can name them. The
    relative positions of the layers with global attention are resized once, linearly, as SAM itself would do at
    every call.
    """

    def __init__(self, encoder: SamVisionEncoder, image_size: int) -> None:
        super().__init__()
        self.patch_embed = encoder.patch_embed
        grid = image_size // self.patch_embed.patch_size[0]
        self.patch_embed.image_size = (image_size, image_size)
        table = cast(Tensor, encoder.pos_embed).detach()
        self.position = PositionalEmbedding(resize_positions(table, grid))
        self.layers = encoder.layers
        self.neck = encoder.neck
        for layer in self.layers:
            if layer.window_size == 0:
                attention = cast(SamVisionAttention, layer.attn)
                for name in ("rel_pos_h", "rel_pos_w"):
                    resized = resize_relative_positions(getattr(attention, name).detach(), 2 * grid - 1)
                    setattr(attention, name, nn.Parameter(resized))

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.position(self.patch_embed(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.neck(hidden)


def load_sam_model(name: str) -> SamModel:
    """A `SamModel` by hub name or folder, in float32."""
    try:
        loaded: Any = SamModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
        model, loading = loaded
    except SafetensorError as error:
        raise UserError(f"the weights in {name} are damaged ({first_line(error)}); download them again.") from error
    except (OSError, ValueError) as error:
        raise no_such_model(name, error) from error
    except Exception as error:  # transformers raises any type for what may be in a configuration
        raise UserError(f"the weights in {name} are not those of its config.json ({first_line(error)}).") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} tensors of a SamModel, first of them {missing[0]}.")
    return model


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Absolute positions (1, h, w, C) to (1, grid, grid, C): averages on a smaller grid, as in the paper."""
    table = table.permute(0, 3, 1, 2)
    if grid <= table.shape[-1]:
        table = F.adaptive_avg_pool2d(table, grid)
    else:
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).contiguous()


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """Relative positions (L, C) to (length, C), linearly."""
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T.contiguous()
