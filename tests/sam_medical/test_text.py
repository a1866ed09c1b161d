"""Text embeddings of label names."""

import json

import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from sam_medical.common.errors import UserError
from sam_medical.models.text import encode_labels


def test_minilm_knows_which_labels_are_alike():
    embeddings = encode_labels("minilm", ["gray matter", "white matter", "surgical grasper"])
    assert embeddings.shape == (3, 384)
    similarity = embeddings @ embeddings.T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3))
    assert similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]


@torch.no_grad()
def test_clip_gives_its_text_features(tiny_clip_folder):
    embeddings = encode_labels(str(tiny_clip_folder), ["liver", "gall bladder"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_folder)
    model = CLIPTextModelWithProjection.from_pretrained(tiny_clip_folder).eval()
    for label, embedding in zip(["liver", "gall bladder"], embeddings, strict=True):
        expected = model(**tokenizer(label, return_tensors="pt")).text_embeds[0]
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_whole_clip_may_have_any_projection_and_precision(tiny_clip_folder, tmp_path):
    """As LAION's do, which keep the width of the projection beside the text encoder's configuration."""
    text = CLIPTextModelWithProjection.from_pretrained(tiny_clip_folder)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {**text.config.to_dict(), "projection_dim": 512}
    clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=24))
    clip.text_model.load_state_dict(text.text_model.state_dict())
    clip.text_projection.load_state_dict(text.text_projection.state_dict())
    clip.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_clip_folder).save_pretrained(tmp_path)
    expected = encode_labels(str(tiny_clip_folder), ["liver"])
    torch.testing.assert_close(encode_labels(str(tmp_path), ["liver"]), expected, atol=1e-5, rtol=1e-4)
    clip.half().save_pretrained(tmp_path)
    half = encode_labels(str(tmp_path), ["liver"])
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, expected, atol=5e-3, rtol=0)


def test_a_label_does_not_depend_on_the_others(tiny_clip_folder):
    for text_encoder in ("minilm", str(tiny_clip_folder)):
        together = encode_labels(text_encoder, ["fat", "liver ligament"])
        torch.testing.assert_close(encode_labels(text_encoder, ["fat"])[0], together[0], atol=1e-5, rtol=1e-4)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="is of type 'vit'"):
        encode_labels(str(tmp_path), ["liver"])
    with pytest.raises(UserError, match="there is no text encoder"):
        encode_labels(str(tmp_path / "nothing"), ["liver"])
