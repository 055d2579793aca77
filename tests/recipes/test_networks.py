"""Reference networks: shapes, parameter counts by their own arithmetic, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.recipes import networks
from lightning_prune.recipes.layers import ZeroPadShortcut, global_mean, he_initialise
from lightning_prune.recipes.residual import BasicBlock, PreActBlock

BN = 2  # parameters of BatchNorm per channel

# name -> arguments of a small variant, shape of its input
SMALL = {
    "convnet": ({"width": 4}, (1, 8, 8)),
    "mlpnet": ({"sizes": (12, 7, 10)}, (3, 2, 2)),
    "resnet20": ({"width": 4}, (3, 32, 32)),
    "resnet56": ({"width": 4}, (3, 16, 16)),
    "preresnet20": ({"width": 4}, (3, 32, 32)),
    "vgg16_bn": ({"width": 4}, (3, 32, 32)),
    "wideresnet_16_8": ({"width": 2}, (3, 16, 16)),
    "mobilenet_v1": ({"width": 0.125}, (3, 32, 32)),
}


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def build(name: str) -> tuple[nn.Module, Tensor]:
    arguments, shape = SMALL[name]
    return getattr(networks, name)(**arguments), torch.randn(3, *shape)


def test_every_public_network_is_tested():
    assert set(SMALL) == set(networks.__all__)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_returns_one_logit_per_class(name: str):
    network, x = build(name)
    assert network(x).shape == (3, 10)


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_reaches_every_parameter(name: str):
    network, x = build(name)
    nn.functional.cross_entropy(network(x), torch.tensor([0, 4, 9])).backward()
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before BatchNorm is subtracted again with the mean: its gradient is rounding noise or zero
    assert [key for key in silent if not (name == "vgg16_bn" and key.endswith("bias"))] == []


@pytest.mark.parametrize("name", [name for name in SMALL if name != "mlpnet"])
def test_channels_and_classes_follow_their_arguments(name: str):
    arguments, shape = SMALL[name]
    network = getattr(networks, name)(in_channels=2, num_classes=4, **arguments)
    assert network(torch.randn(2, 2, *shape[1:])).shape == (2, 4)


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_draws_the_same_weights(name: str):
    torch.manual_seed(5)
    first, _ = build(name)
    torch.manual_seed(5)
    second, _ = build(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def resnet_count(blocks: int, width: int) -> int:
    """Stem, three stages of `blocks` pairs of 3x3 convolutions with BatchNorm, one linear layer."""
    total = 9 * 3 * width + BN * width
    previous = width
    for stage in (width, 2 * width, 4 * width):
        total += 9 * previous * stage + 9 * stage * stage * (2 * blocks - 1) + 2 * blocks * BN * stage
        previous = stage
    return total + 4 * width * 10 + 10


def test_resnet20_has_269722_parameters():
    assert count(networks.resnet20()) == resnet_count(3, 16) == 269_722


def test_resnet56_has_three_times_the_blocks_of_resnet20():
    assert count(networks.resnet56()) == resnet_count(9, 16)


def test_projections_of_option_b_add_two_small_convolutions_with_batch_norm():
    extra = (16 * 32 + BN * 32) + (32 * 64 + BN * 64)
    assert count(networks.resnet20(shortcut="B")) == count(networks.resnet20()) + extra


def test_preresnet20_moves_each_batch_norm_to_the_input_of_its_convolution():
    convolutions = resnet_count(3, 16) - BN * (16 + 6 * (16 + 32 + 64))
    inputs = (6 * 16) + (16 + 5 * 32) + (32 + 5 * 64)  # channels read by the six convolutions of each stage
    assert count(networks.preresnet20()) == convolutions + BN * (inputs + 64)


def test_wideresnet_16_8_has_two_blocks_per_stage_of_8_times_the_width():
    total, previous = 9 * 3 * 16, 16
    for stage in (128, 256, 512):
        total += BN * previous + 9 * previous * stage + BN * stage + 9 * stage * stage + previous * stage
        total += 2 * (BN * stage + 9 * stage * stage)
        previous = stage
    assert count(networks.wideresnet_16_8()) == total + BN * 512 + 512 * 10 + 10


def test_vgg16_bn_has_13_convolutions_with_bias_and_batch_norm():
    channels = [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    inputs = [3, *channels[:-1]]
    convolutions = sum(9 * i * o + o + BN * o for i, o in zip(inputs, channels, strict=True))
    assert count(networks.vgg16_bn()) == convolutions + 512 * 10 + 10 == 14_728_266


def test_mobilenet_v1_has_13_separable_convolutions():
    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    pairs = itertools.pairwise(channels)
    separable = sum(9 * i + BN * i + i * o + BN * o for i, o in pairs)
    assert count(networks.mobilenet_v1()) == 9 * 3 * 32 + BN * 32 + separable + 1024 * 10 + 10


def test_mlpnet_has_three_weights_and_no_bias():
    shapes = {name: tuple(p.shape) for name, p in networks.mlpnet().named_parameters()}
    assert shapes == {"fc1.weight": (40, 784), "fc2.weight": (20, 40), "fc3.weight": (10, 20)}
    assert count(networks.mlpnet()) == 784 * 40 + 40 * 20 + 20 * 10 == 32_360


def test_convnet_has_four_convolutions_with_batch_norm():
    pairs = [(1, 16), (16, 32), (32, 48), (48, 64)]
    assert count(networks.convnet()) == sum(9 * i * o + BN * o for i, o in pairs) + 64 * 10 + 10


def test_mlpnet_is_a_product_of_matrices_with_relu_between():
    network = networks.mlpnet((3, 2, 1))
    with torch.no_grad():
        network.fc1.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]]))
        network.fc2.weight.copy_(torch.tensor([[10.0, 5.0]]))
    # hidden: relu(1 + 4 + 9) = 14 and relu(-1) = 0; output: 140
    assert network(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[140.0]]


@pytest.mark.parametrize("size", [8, 9, 28, 32, 40])
def test_convnet_takes_any_image_of_at_least_8_pixels(size: int):
    assert networks.convnet(in_channels=2, width=2)(torch.randn(1, 2, size, size)).shape == (1, 10)


@pytest.mark.parametrize(("stride", "size"), [(1, 2), (2, 1)])
def test_the_stem_of_mobilenet_halves_the_image_at_stride_2(stride: int, size: int):
    network = networks.mobilenet_v1(width=0.1, stem_stride=stride)
    assert network.features(torch.randn(2, 3, 32, 32)).shape[2:] == (size, size)


def test_no_layer_of_a_thin_mobilenet_has_fewer_than_8_channels():
    widths = [m.out_channels for m in networks.mobilenet_v1(width=0.01).modules() if isinstance(m, nn.Conv2d)]
    assert min(widths) == 8


def test_the_zero_padded_shortcut_takes_every_second_position_and_centres_the_channels():
    x = torch.arange(2 * 3 * 3, dtype=torch.float32).reshape(1, 2, 3, 3) + 1
    out = ZeroPadShortcut(2, 5, stride=2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert out[0, 1].tolist() == [[1.0, 3.0], [7.0, 9.0]]
    assert out[0, 2].tolist() == [[10.0, 12.0], [16.0, 18.0]]
    assert not out[0, [0, 3, 4]].any()


def test_a_block_with_zero_weights_is_its_shortcut():
    x = torch.randn(2, 4, 8, 8)
    for block in (BasicBlock(4, 8, 2, "A"), PreActBlock(4, 8, 2, "A")):
        for p in block.parameters():
            nn.init.zeros_(p)
        expected = ZeroPadShortcut(4, 8, 2)(x)
        assert torch.equal(block(x), expected.relu() if isinstance(block, BasicBlock) else expected)


def test_a_projection_reads_the_activated_input_before_activation_blocks():
    block = PreActBlock(2, 4, 2, "B").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    expected = block.shortcut(torch.relu(block.bn1(x)))
    assert torch.equal(block(x), expected)


def test_the_global_mean_averages_over_positions_only():
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 8.0]]]])
    assert global_mean(x).tolist() == [[2.0, 5.0]]


def test_he_initialisation_has_variance_two_over_fan_out_and_no_bias():
    layer = nn.Conv2d(64, 128, 3)
    he_initialise(layer)
    fan_out = 128 * 9
    # 73,728 draws: the relative error of a variance is sqrt(2 / n) = 0.5 %
    assert layer.weight.var().item() == pytest.approx(2 / fan_out, rel=0.03)
    assert not layer.bias.any()


@pytest.mark.parametrize("name", [name for name in SMALL if name != "mlpnet"])
@pytest.mark.parametrize("argument", ["in_channels", "num_classes", "width"])
def test_a_size_of_zero_is_refused(name: str, argument: str):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        getattr(networks, name)(**{argument: 0})


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "preresnet20"])
def test_an_unknown_shortcut_is_refused(name: str):
    with pytest.raises(ValueError, match="`shortcut` must be one of 'A', 'B', got 'C'"):
        getattr(networks, name)(shortcut="C")


def test_a_stem_stride_of_three_is_refused():
    with pytest.raises(ValueError, match="`stem_stride` must be one of"):
        networks.mobilenet_v1(stem_stride=3)


@pytest.mark.parametrize("sizes", [(10,), (10, 0, 3)])
def test_a_perceptron_without_layers_or_units_is_refused(sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match="`sizes` must"):
        networks.mlpnet(sizes)
