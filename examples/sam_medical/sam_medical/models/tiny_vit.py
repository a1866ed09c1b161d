"""LiteMedSAM's image encoder: a TinyViT (arXiv:2207.10666) with an output stride of 4.

The network is used with its published weights only. Their batch norms are frozen, so `fold_batch_norms` folds them
into the preceding convolutions when a checkpoint is loaded. Unlike the published module, this one accepts images of
any size that is a multiple of four.

Shape legend: B batch, C channels, H W pixels or positions, N positions of a window, n windows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

OUTPUT_STRIDE = 4
WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
# The first stage is convolutional, without attention.
HEADS = (0, 4, 5, 10)
WINDOWS = (0, 7, 14, 7)
# The last stage does not downsample, so the output stride is 4.
DOWNSAMPLING_STRIDES = (2, 2, 1)
OUTPUT_CHANNELS = 256


def convolution(channels: int, out_channels: int, kernel: int = 1, stride: int = 1, depthwise: bool = False):
    return nn.Conv2d(
        channels, out_channels, kernel, stride, padding=kernel // 2, groups=out_channels if depthwise else 1
    )


class InvertedBottleneck(nn.Module):
    """The block of the first stage: 4x expansion, depthwise convolution, projection. (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv1 = convolution(channels, hidden)
        self.conv2 = convolution(hidden, hidden, kernel=3, depthwise=True)
        self.conv3 = convolution(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class Downsampling(nn.Module):
    """Changes width and resolution between two stages. (B, C, H, W)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, out_channels)
        self.conv2 = convolution(out_channels, out_channels, kernel=3, stride=stride, depthwise=True)
        self.conv3 = convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class RelativePositionBias(nn.Module):
    """A learned attention bias per head and absolute offset (|dy|, |dx|) inside a window.

    ``weight`` is (heads, window²), with the offsets in row-major order. The result is (heads, N, N).
    """

    offsets: Tensor

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, window * window))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        offsets = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self) -> Tensor:
        return self.weight[:, self.offsets]


class WindowAttention(nn.Module):
    """Self-attention within each window. (B * n, N, C)."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.position = RelativePositionBias(heads, window)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        # torch's fused attention has no kernel for a trainable bias, and its fallback is slower than this code.
        scores = (query * query.shape[-1] ** -0.5) @ key.mT + self.position()
        attended = scores.softmax(-1) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TransformerBlock(nn.Module):
    """Window attention, a depthwise convolution and an MLP. (B, H, W, C)."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(channels, heads, window)
        self.local_conv = convolution(channels, channels, kernel=3, depthwise=True)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend_in_windows(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def attend_in_windows(self, x: Tensor) -> Tensor:
        """Applies attention in windows from the top left corner. The last row and column are padded with zeros."""
        batch, height, width, channels = x.shape
        window = self.window
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        padded_height, padded_width = x.shape[1:3]
        x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
        x = self.attn(x.reshape(-1, window * window, channels))
        x = x.reshape(batch, padded_height // window, padded_width // window, window, window, channels)
        x = x.transpose(2, 3).reshape(batch, padded_height, padded_width, channels)
        return x[:, :height, :width]


class ConvolutionalStage(nn.Module):
    """(B, C, H, W) to (B, C', H', W')."""

    def __init__(self, channels: int, depth: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(InvertedBottleneck(channels) for _ in range(depth)))
        self.downsample = Downsampling(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class TransformerStage(nn.Module):
    """(B, C, H, W) to (B, C', H', W'). The last stage does not downsample."""

    def __init__(self, channels: int, depth: int, heads: int, window: int, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads, window) for _ in range(depth)))
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TinyViTEncoder(nn.Module):
    """From pixel values (B, 3, H, W) between zero and one to image embeddings (B, 256, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            convolution(3, WIDTHS[0] // 2), nn.GELU(), convolution(WIDTHS[0] // 2, WIDTHS[0])
        )
        stages: list[nn.Module] = [ConvolutionalStage(WIDTHS[0], DEPTHS[0], WIDTHS[1], DOWNSAMPLING_STRIDES[0])]
        for i in range(1, len(WIDTHS)):
            is_last = i == len(WIDTHS) - 1
            downsample = nn.Identity() if is_last else Downsampling(WIDTHS[i], WIDTHS[i + 1], DOWNSAMPLING_STRIDES[i])
            stages.append(TransformerStage(WIDTHS[i], DEPTHS[i], HEADS[i], WINDOWS[i], downsample))
        self.layers = nn.Sequential(*stages)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], OUTPUT_CHANNELS, 1, bias=False),
            SamLayerNorm(OUTPUT_CHANNELS, data_format="channels_first"),
            nn.Conv2d(OUTPUT_CHANNELS, OUTPUT_CHANNELS, 3, padding=1, bias=False),
            SamLayerNorm(OUTPUT_CHANNELS, data_format="channels_first"),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        # In channels-last format, the permutations between convolutions and transformer blocks need no copies.
        hidden = self.patch_embed(pixel_values.contiguous(memory_format=torch.channels_last))
        return self.neck(self.layers(hidden))


def convert_encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the published encoder's state dict to `TinyViTEncoder`: folds batch norms, renames tensors."""
    renamed = {}
    for name, tensor in fold_batch_norms(weights).items():
        name = name.replace("patch_embed.seq.", "patch_embed.").replace("attention_biases", "position.weight")
        renamed[name] = tensor
    return renamed


def fold_batch_norms(weights: Mapping[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Merges each pair of ``X.c`` (convolution without bias) and ``X.bn`` into one convolution ``X``."""
    folded = {}
    for name, tensor in weights.items():
        if name.endswith(".c.weight"):
            prefix = name.removesuffix(".c.weight")
            norm = {
                key: weights[f"{prefix}.bn.{key}"].double()
                for key in ("weight", "bias", "running_mean", "running_var")
            }
            gain = norm["weight"] / (norm["running_var"] + eps).sqrt()
            folded[f"{prefix}.weight"] = (tensor.double() * gain[:, None, None, None]).to(tensor.dtype)
            folded[f"{prefix}.bias"] = (norm["bias"] - norm["running_mean"] * gain).to(tensor.dtype)
        elif ".bn." not in name:
            folded[name] = tensor
    return folded
