"""Building blocks shared by the reference networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution that keeps the size at stride 1; no bias, since a BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def he_initialise(network: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out), in place, by the global random generator.

    He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852. Biases become zero.

    Args:
        network: any module; layers other than convolutions keep what PyTorch gave them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def global_mean(features: Tensor) -> Tensor:
    """Average every channel over its positions: (N, C, H, W) -> (N, C), of the same dtype.

    A mean instead of `AdaptiveAvgPool2d`, whose backward pass on CUDA does not repeat bit for bit.
    """
    return features.mean(dim=(2, 3))


class ZeroPadShortcut(nn.Module):
    """The shortcut without parameters: take every `stride`-th position, fill the new channels with zeros.

    "Option A" of He et al., CVPR 2016, section 3.3; half of the zeros come before the old channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, >= `in_channels`.
        stride: step between two kept positions, >= 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride = stride
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def make_shortcut(in_channels: int, out_channels: int, stride: int, option: str) -> nn.Module:
    """Build the shortcut of a residual block: identity where shapes agree, else option "A" or "B".

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the block.
        option: "A" pads with zeros and has no parameters; "B" is a 1x1 convolution.
    Returns:
        A module from (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
