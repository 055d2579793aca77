"""Reference networks for small images; all return logits.

Every factory is importable from here: `convnet`, `mlpnet`, `vgg16_bn`, `mobilenet_v1` and, from
`residual.py`, `resnet20`, `resnet56`, `preresnet20`, `wideresnet_16_8`. Written from the papers named
in their docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.checks import check_choice, check_integer, check_positive
from lightning_prune.recipes.layers import conv3x3, global_mean, he_initialise
from lightning_prune.recipes.residual import check_sizes, preresnet20, resnet20, resnet56, wideresnet_16_8

__all__ = [
    "convnet",
    "mlpnet",
    "mobilenet_v1",
    "preresnet20",
    "resnet20",
    "resnet56",
    "vgg16_bn",
    "wideresnet_16_8",
]

# channels of the 13 convolutions, in multiples of 64; "M" halves the image (configuration D of the paper)
_VGG16 = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")

# channels and stride of the 13 separable convolutions (table 1 of the paper)
_MOBILENET = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class FeatureClassifier(nn.Module):
    """A chain of layers, a global mean over positions, one linear layer.

    Args:
        features: from images (N, C, H, W) to features (N, `channels`, H', W').
        channels: channels of the features.
        num_classes: number of logits.
    """

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, num_classes)."""
        return self.classifier(global_mean(self.features(x)))


class MLPNet(nn.Module):
    """Fully connected layers `fc1`, `fc2`, ... without biases, with ReLU between them.

    Args:
        sizes: units of the input, of every hidden layer and of the output; at least two integers >= 1.
    Raises:
        ValueError: if `sizes` has fewer than two entries or one below 1.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"`sizes` must name the input and the output at least, got {list(sizes)}.")
        for size in sizes:
            check_integer("sizes", size, 1)
        self.depth = len(sizes) - 1
        for index in range(self.depth):
            self.add_module(f"fc{index + 1}", nn.Linear(sizes[index], sizes[index + 1], bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) with `sizes[0]` values a sample -> logits (N, sizes[-1])."""
        x = x.flatten(1)
        for index in range(1, self.depth):
            x = F.relu(self.get_submodule(f"fc{index}")(x))
        return self.get_submodule(f"fc{self.depth}")(x)


def mlpnet(sizes: Sequence[int] = (784, 40, 20, 10)) -> MLPNet:
    """Build MLPNet, the small benchmark of second-order pruning: 32,360 weights with the defaults, no biases.

    Singh and Alistarh, "WoodFisher", NeurIPS 2020, arXiv:2004.14340, and its successors prune this network.

    Args:
        sizes: units of the input, of every hidden layer and of the output; at least two integers >= 1.
    Returns:
        A network from (N, ...) with sizes[0] values a sample to logits (N, sizes[-1]).
    """
    return MLPNet(sizes)


def convnet(in_channels: int = 1, num_classes: int = 10, width: int = 16) -> FeatureClassifier:
    """Build a small network of four 3x3 convolutions with BatchNorm: 47,194 parameters with the defaults.

    Channels are w, 2w, 3w, 4w; the image is halved after the second and the third, so an 8 x 8 image still
    has 2 x 2 positions at the end and BatchNorm works with a batch of one.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels w of the first convolution, >= 1.
    Returns:
        A network from (N, in_channels, H, W) with H, W >= 8 to logits (N, num_classes).
    """
    check_sizes(in_channels, num_classes, width)
    layers: list[nn.Module] = []
    previous = in_channels
    for factor in (1, 2, 3, 4):
        layers += [conv3x3(previous, factor * width), nn.BatchNorm2d(factor * width), nn.ReLU()]
        if factor in (2, 3):
            layers.append(nn.MaxPool2d(2))
        previous = factor * width
    return FeatureClassifier(nn.Sequential(*layers), previous, num_classes)


def vgg16_bn(in_channels: int = 3, num_classes: int = 10, width: int = 64) -> FeatureClassifier:
    """Build VGG-16 with BatchNorm and a single linear layer, for CIFAR: 14,728,266 parameters.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
    arXiv:1409.1556, configuration D; the three wide linear layers give way to one, as is usual for CIFAR.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: channels of the first convolution, >= 1.
    Returns:
        A network from (N, in_channels, H, W) with H, W >= 32 to logits (N, num_classes).
    """
    check_sizes(in_channels, num_classes, width)
    layers: list[nn.Module] = []
    previous = in_channels
    for entry in _VGG16:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
            continue
        channels = entry * width
        layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        previous = channels
    return FeatureClassifier(nn.Sequential(*layers), previous, num_classes)


def mobilenet_v1(
    in_channels: int = 3, num_classes: int = 10, width: float = 1.0, stem_stride: int = 1
) -> FeatureClassifier:
    """Build MobileNetV1: 3,217,226 parameters with the defaults, which suit 32 x 32 images.

    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
    arXiv:1704.04861, table 1. The image is halved four times, and once more by a stem of stride 2.

    Args:
        in_channels: channels of the image, >= 1.
        num_classes: number of logits, >= 1.
        width: the paper's width multiplier of all channels, > 0; no layer gets fewer than 8 channels.
        stem_stride: stride of the first convolution: 1 for 32 x 32 images, 2 for 224 x 224.
    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).
    Raises:
        ValueError: if a size is below 1, `width` is not positive or `stem_stride` is neither 1 nor 2.
    """
    check_sizes(in_channels, num_classes, 1)
    check_positive("width", width)
    check_choice("stem_stride", str(stem_stride), ("1", "2"))
    previous = max(8, round(32 * width))
    layers: list[nn.Module] = [*_norm_relu(conv3x3(in_channels, previous, stem_stride))]
    for base, stride in _MOBILENET:
        channels = max(8, round(base * width))
        layers += _norm_relu(conv3x3(previous, previous, stride, groups=previous))
        layers += _norm_relu(nn.Conv2d(previous, channels, 1, bias=False))
        previous = channels
    return FeatureClassifier(nn.Sequential(*layers), previous, num_classes)


def _norm_relu(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
