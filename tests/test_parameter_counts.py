"""The number of trained values in the paper's setting, SAM's ViT-B image encoder."""

import pytest
from peft import get_peft_model
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from svdtune import SVDScaleShiftConfig


@pytest.fixture(scope="module")
def encoder():
    # The defaults are ViT-B's. transformers' own initializer_range of 1e-10 would make the weights all but zero.
    return SamVisionEncoder(SamVisionConfig(image_size=256, initializer_range=0.02))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_sam_vit_b(encoder):
    linear = ["qkv", "proj", "lin1", "lin2"]
    model = get_peft_model(encoder, SVDScaleShiftConfig(target_modules=linear), "blocks")
    assert model.get_nb_trainable_parameters()[0] == 73_728  # 12 blocks, 4 layers, 2 * 768 each

    with_neck = SVDScaleShiftConfig(target_modules=[*linear, "neck.conv1", "neck.conv2"])
    model.add_adapter("blocks and neck", with_neck)
    model.set_adapter("blocks and neck")
    assert model.get_nb_trainable_parameters()[0] == 74_752  # and 2 convolutions, 2 * 256 each
