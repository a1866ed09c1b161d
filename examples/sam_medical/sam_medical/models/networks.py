"""The paper's baselines without SAM, trained from scratch: from images to one mask per label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.nets import UNETR, BasicUNet
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model

from sam_medical.models.pixels import ImagenetNormalization

# Image sides must be multiples of this, for the downsampling of every network and the patches of UNETR.
STRIDE = 32


class SegmentationNetwork(nn.Module):
    """A network with the interface of a `Backbone`: from images (B, 3, S, S) to mask logits (B, K, S, S)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.pixels = ImagenetNormalization()
        self.network = network

    def forward(self, images: Tensor, true_masks: Tensor | None = None) -> Tensor:
        size = images.shape[-2:]
        inner_size = [rounded_up(side) for side in size]
        inner = F.interpolate(self.pixels(images), size=inner_size, mode="bilinear", align_corners=False)
        return F.interpolate(self.network(inner), size=size, mode="bilinear", align_corners=False)


def convolution(channels: int, out_channels: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Returns a convolution with batch norm and ReLU that keeps the resolution."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class AtrousPyramid(nn.Module):
    """DeepLab's atrous spatial pyramid pooling: convolutions of several dilations, and global average pooling."""

    DILATIONS = (6, 12, 18)

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        views = [convolution(channels, out_channels, kernel=1)]
        views += [convolution(channels, out_channels, dilation=dilation) for dilation in self.DILATIONS]
        self.views = nn.ModuleList(views)
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), convolution(channels, out_channels, kernel=1))
        self.mix = convolution((len(views) + 1) * out_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        views = [view(x) for view in self.views]
        return self.mix(torch.cat([*views, self.whole(x).expand(-1, -1, *x.shape[-2:])], dim=1))


class DeepLab(nn.Module):
    """DeepLab v3+ (arXiv:1802.02611): MobileNetV2 of transformers at stride 16, atrous pyramid, and decoder.

    transformers' own DeepLab class has neither the dilations of the pyramid nor the decoder.
    """

    WIDTH, FINE_WIDTH = 256, 48
    FINE_LAYER, FINE_CHANNELS, COARSE_CHANNELS = 1, 24, 320  # MobileNetV2 features at strides 4 and 16

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.encoder = MobileNetV2Model(MobileNetV2Config(output_stride=16), add_pooling_layer=False)
        self.encoder.set_submodule("conv_1x1", nn.Identity())
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # transformers sets TensorFlow's 0.997, which is 0.003 in PyTorch's convention
        fine, coarse = self.FINE_CHANNELS, self.COARSE_CHANNELS
        self.pyramid = AtrousPyramid(coarse, self.WIDTH)
        self.project = convolution(fine, self.FINE_WIDTH, kernel=1)
        self.decode = nn.Sequential(
            convolution(self.WIDTH + self.FINE_WIDTH, self.WIDTH), convolution(self.WIDTH, self.WIDTH)
        )
        self.classify = nn.Conv2d(self.WIDTH, labels, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = self.encoder(images, output_hidden_states=True).hidden_states
        fine = self.project(levels[self.FINE_LAYER])
        coarse = F.interpolate(self.pyramid(levels[-1]), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify(self.decode(torch.cat([coarse, fine], dim=1)))


class SegNet(nn.Module):
    """SegNet (arXiv:1511.00561): a VGG16 encoder, and a mirrored decoder that unpools with the encoder's indices.

    It is implemented here because no maintained library provides it.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for widths in self.STAGES:
            self.encoder.append(self._stage(channels, widths))
            channels = widths[-1]
        narrower = [*(stage[-1] for stage in self.STAGES[:-1])][::-1]
        for mirrored, out_channels in zip(self.STAGES[:0:-1], narrower, strict=True):
            self.decoder.append(self._stage(mirrored[-1], (*mirrored[1:], out_channels)))
        self.decoder.append(self._stage(64, (64,)))
        self.classify = nn.Conv2d(64, labels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x, pooled = images, []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[-2:]
            x, positions = F.max_pool2d(x, 2, return_indices=True)
            pooled.append((positions, size))
        for stage, (positions, size) in zip(self.decoder, reversed(pooled), strict=True):
            x = stage(F.max_unpool2d(x, positions, [2, 2], output_size=size))
        return self.classify(x)

    @staticmethod
    def _stage(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
        pairs = zip((channels, *widths), widths, strict=False)
        return nn.Sequential(*(convolution(before, after) for before, after in pairs))


def deep_lab(labels: int, side: int) -> nn.Module:
    return DeepLab(labels)


def segnet(labels: int, side: int) -> nn.Module:
    return SegNet(labels)


def unet(labels: int, side: int) -> nn.Module:
    return BasicUNet(spatial_dims=2, in_channels=3, out_channels=labels, features=(32, 64, 128, 256, 512, 32))


def unetr(labels: int, side: int) -> nn.Module:
    network = UNETR(in_channels=3, out_channels=labels, img_size=(side, side), spatial_dims=2)
    for name, module in network.named_modules():
        if "cross_attn" in name:  # MONAI's blocks have cross-attention, which UNETR does not use
            module.requires_grad_(False)
    return network


def rounded_up(side: int) -> int:
    return STRIDE * -(-side // STRIDE)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
