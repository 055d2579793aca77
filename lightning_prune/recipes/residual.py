"""Residual networks for small images: ResNet, pre-activation ResNet and WideResNet.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2.
He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv:1603.05027, figure 1(b).
Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146, table 1.

All have a 3x3 stem, three stages that halve the image at the second and third, a global mean and one linear
layer, so they accept any image of at least 4 x 4 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.checks import check_choice, check_integer
from lightning_prune.recipes.layers import conv3x3, global_mean, he_initialise, make_shortcut

__all__ = ["preresnet20", "resnet20", "resnet56", "wideresnet_16_8"]


class BasicBlock(nn.Module):
    """relu(x' + BN(conv(relu(BN(conv(x)))))), where x' is the shortcut of x.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution.
        option: shortcut where shapes differ: "A" (zeros) or "B" (1x1 convolution and BatchNorm).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        shortcut = make_shortcut(in_channels, out_channels, stride, option)
        if isinstance(shortcut, nn.Conv2d):
            shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """x' + conv(relu(BN(conv(relu(BN(x)))))), where x' is the shortcut of x.

    A 1x1 convolution reads the activated input (as in WideResNet); zeros are padded to the raw one.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution.
        option: shortcut where shapes differ: "A" (zeros) or "B" (1x1 convolution).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        activated = F.relu(self.bn1(x))
        skip = self.shortcut(activated if isinstance(self.shortcut, nn.Conv2d) else x)
        out = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(out) + skip


def make_stages(block: type[nn.Module], stem: int, channels: Sequence[int], blocks: int, option: str) -> nn.Sequential:
    """Stack a stage of `blocks` blocks per entry of `channels`; all but the first start at stride 2."""
    stages, width = [], stem
    for index, out_channels in enumerate(channels):
        first = block(width, out_channels, 1 if index == 0 else 2, option)
        rest = [block(out_channels, out_channels, 1, option) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(first, *rest))
        width = out_channels
    return nn.Sequential(*stages)


class ResNet(nn.Module):
    """Residual network of 6 * `blocks` + 2 layers with widths w, 2w, 4w.

    Args:
        blocks: blocks in each of the three stages, >= 1.
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels w of the stem and the first stage, >= 1.
        shortcut: "A" (zeros, the paper's choice for CIFAR) or "B" (1x1 convolutions).
    Raises:
        ValueError: if a size is below 1 or `shortcut` is neither "A" nor "B".
    """

    def __init__(self, blocks: int, in_channels: int, num_classes: int, width: int, shortcut: str) -> None:
        super().__init__()
        check_sizes(in_channels, num_classes, width)
        check_choice("shortcut", shortcut, ("A", "B"))
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = make_stages(BasicBlock, width, (width, 2 * width, 4 * width), blocks, shortcut)
        self.fc = nn.Linear(4 * width, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, num_classes)."""
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(global_mean(out))


class PreActResNet(nn.Module):
    """Pre-activation residual network; BatchNorm and ReLU also close the last stage.

    Args:
        blocks: blocks in each of the three stages, >= 1.
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        stem: channels of the first convolution, >= 1.
        channels: channels of the three stages, each >= the one before.
        shortcut: "A" (zeros) or "B" (1x1 convolutions).
    Raises:
        ValueError: if a size is below 1 or `shortcut` is neither "A" nor "B".
    """

    def __init__(
        self,
        blocks: int,
        in_channels: int,
        num_classes: int,
        stem: int,
        channels: Sequence[int],
        shortcut: str,
    ) -> None:
        super().__init__()
        check_sizes(in_channels, num_classes, stem)
        check_choice("shortcut", shortcut, ("A", "B"))
        self.conv1 = conv3x3(in_channels, stem)
        self.stages = make_stages(PreActBlock, stem, channels, blocks, shortcut)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, num_classes)."""
        out = self.stages(self.conv1(x))
        return self.fc(global_mean(F.relu(self.bn(out))))


def check_sizes(in_channels: int, num_classes: int, width: int) -> None:
    """Raise ValueError unless all three are integers of at least 1."""
    for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("width", width)):
        check_integer(name, value, 1)


def resnet20(in_channels: int = 3, num_classes: int = 10, width: int = 16, shortcut: str = "A") -> ResNet:
    """Build the ResNet-20 of He et al. (CVPR 2016) for CIFAR: 269,722 parameters with the defaults.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels of the first stage, >= 1.
        shortcut: "A" (zeros) or "B" (1x1 convolutions).
    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).
    """
    return ResNet(3, in_channels, num_classes, width, shortcut)


def resnet56(in_channels: int = 3, num_classes: int = 10, width: int = 16, shortcut: str = "A") -> ResNet:
    """Build the ResNet-56 of He et al. (CVPR 2016) for CIFAR: 853,018 parameters with the defaults.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels of the first stage, >= 1.
        shortcut: "A" (zeros) or "B" (1x1 convolutions).
    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).
    """
    return ResNet(9, in_channels, num_classes, width, shortcut)


def preresnet20(in_channels: int = 3, num_classes: int = 10, width: int = 16, shortcut: str = "A") -> PreActResNet:
    """Build the pre-activation ResNet-20 of He et al. (ECCV 2016): 269,722 parameters.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels of the first stage, >= 1.
        shortcut: "A" (zeros) or "B" (1x1 convolutions).
    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).
    """
    return PreActResNet(3, in_channels, num_classes, width, (width, 2 * width, 4 * width), shortcut)


def wideresnet_16_8(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> PreActResNet:
    """Build the WideResNet-16-8 of Zagoruyko and Komodakis (BMVC 2016): 10,961,370 parameters.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels of the stem, >= 1; the stages have 8, 16 and 32 times as many.
    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).
    """
    return PreActResNet(2, in_channels, num_classes, width, (8 * width, 16 * width, 32 * width), "B")
