"""Structured ProsPr: which channels can be proved independent, where the gate sits, what is removed with a channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import MaskManager, ProsPr, prune
from lightning_prune.methods._prospr_channels import ChannelGroup, ChannelUnits, prove_channels

Batch = tuple[Tensor, Tensor]


def entropy(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def chain() -> nn.Sequential:
    """conv - norm - ReLU - pool - conv - ReLU - mean - linear on images of 1 x 6 x 6."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def batches(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 6, 6, generator=generator), torch.arange(8) % 3) for _ in range(count)]


def proved(
    module: nn.Module, gate: str = "output", batch: Batch | None = None
) -> tuple[list[ChannelGroup], list[str]]:
    leaves = dict(module.named_parameters())
    loss = entropy(module, batches(1)[0] if batch is None else batch)
    return prove_channels(loss, leaves, [n for n, p in leaves.items() if p.dim() > 1], gate)


def spread(module: nn.Module) -> nn.Module:
    """Give norms weights and biases that differ per channel, as no initialization does."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.weight.uniform_(0.5, 1.5)
                child.bias.uniform_(-0.5, 0.5)
    return module


# which channels


def test_a_norm_after_a_convolution_joins_its_channels() -> None:
    groups, outputs = proved(chain())
    assert groups == [
        ChannelGroup(
            "0.weight",
            ("1.weight", "1.bias"),
            ("0.weight", "0.bias", "1.weight", "1.bias"),
            (("4.weight", 1),),
        ),
        ChannelGroup("4.weight", ("4.weight", "4.bias"), ("4.weight", "4.bias"), (("8.weight", 1),)),
    ]
    assert outputs == ["8.weight"]


def test_the_weight_gate_sits_before_the_norm() -> None:
    groups, _ = proved(chain(), "weight")
    assert [group.gate for group in groups] == [("0.weight",), ("4.weight",)]


def test_flattened_channels_are_read_by_blocks_of_a_linear_layer() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 7, bias=False), nn.SiLU(), nn.Linear(7, 3)
    )
    groups, outputs = proved(module)
    assert [group.consumers for group in groups] == [(("3.weight", 16),), (("5.weight", 1),)]
    assert [group.members for group in groups] == [("0.weight", "0.bias"), ("3.weight",)]
    assert outputs == ["5.weight"]


class Block(nn.Module):
    """A stem and a body with one weakness each, then a linear head."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self, torch.relu(self.stem(images))).mean((2, 3)))


def test_a_residual_sum_is_refused_by_name() -> None:
    module = Block(lambda block, x: x + block.conv(x))
    with pytest.raises(
        ValueError, match=r"'stem.weight' \(its output enters AddBackward0\), 'conv.weight' \(its output "
    ):
        proved(module)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "concatenation": (lambda: Block(lambda b, x: torch.cat([b.conv(x), x], 1)[:, :4]), "CatBackward0"),
    "twice used": (lambda: Block(lambda b, x: b.conv(b.conv(x))), r"'conv.weight' \(it is used 2 times\)"),
    "never used": (lambda: Block(lambda b, x: x), r"'conv.weight' \(the loss does not depend on it\)"),
    "grouped": (
        lambda: Block(lambda b, x: b.deep(b.conv(x)), deep=nn.Conv2d(4, 4, 1, groups=2)),
        r"'conv.weight' \(its output enters 'deep.weight', a grouped layer\), 'deep.weight' \(a grouped or transposed",
    ),
    "transposed": (
        lambda: Block(lambda b, x: b.up(b.conv(x)), up=nn.ConvTranspose2d(4, 4, 1)),
        r"'up.weight' \(a grouped or transposed convolution\)",
    ),
    "not zero at zero": (lambda: Block(lambda b, x: b.conv(x).sigmoid()), r"its output enters SigmoidBackward0"),
    "mean over channels": (lambda: Block(lambda b, x: x * b.conv(x).mean(1, keepdim=True)), "MeanBackward1"),
    "clipped above zero": (lambda: Block(lambda b, x: b.conv(x).clamp(0.5, 1.0)), "ClampBackward1"),
    "norm without parameters": (
        lambda: Block(lambda b, x: b.norm(b.conv(x)), norm=nn.BatchNorm2d(4, affine=False)),
        "the norm after it has no weight and bias of its own",
    ),
    "norm over channels": (lambda: Block(lambda b, x: b.norm(b.conv(x)), norm=nn.GroupNorm(2, 4)), "NativeGroupNorm"),
    "computed weight": (
        lambda: Block(lambda b, x: nn.functional.conv2d(x, 2 * b.conv.weight)),
        r"'conv.weight' \(it is used by MulBackward0\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_proved_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        proved(make())


def test_a_network_of_outputs_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finds no channel to prune: 1.weight feed the loss directly"):
        proved(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def test_rectifiers_that_hold_zero_at_zero_pass() -> None:
    groups, _ = proved(
        Block(lambda b, x: nn.functional.hardtanh(nn.functional.dropout(b.conv(x)), -1.0, 6.0))
    )
    assert [group.name for group in groups] == ["stem.weight", "conv.weight"]


# the gate


def gate_scores(module: nn.Module, gate: str) -> Tensor:
    """|dL/dc| of the first convolution's channels at M = 0, on the first batch."""
    loss = entropy(module, batches(1)[0])
    leaves = dict(module.named_parameters())
    groups, _ = prove_channels(loss, leaves, [n for n, p in leaves.items() if p.dim() > 1], gate)
    alive = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in leaves.items()}
    units = ChannelUnits(groups, [], {name: tuple(leaf.shape) for name, leaf in leaves.items()}, alive)
    slopes = torch.autograd.grad(loss, [leaves[name] for name in units.wanted])
    signed = {name: (leaves[name] * slope).detach() for name, slope in zip(units.wanted, slopes, strict=True)}
    return units.scores(signed)["0.weight"]


def test_the_gate_after_the_norm_equals_the_gate_at_the_consumer_without_inner_steps() -> None:
    module = spread(chain()).double()
    data = [(images.double(), labels) for images, labels in batches(1)]
    loss = entropy(module, data[0])
    weight = module[4].weight
    (slope,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    consumer = (weight * slope).sum((0, 2, 3)).abs().detach()
    leaves = dict(module.named_parameters())
    scale, shift = torch.autograd.grad(loss, [leaves["1.weight"], leaves["1.bias"]])
    ours = (leaves["1.weight"] * scale + leaves["1.bias"] * shift).abs().detach()
    assert torch.allclose(ours, consumer, rtol=1e-12, atol=1e-16)
    assert torch.allclose(gate_scores(module.float(), "output").double(), consumer, rtol=1e-4)


def test_the_gate_before_the_norm_sees_next_to_nothing() -> None:
    module = spread(chain())
    module[0].bias = None
    with torch.no_grad():
        module[0].weight.mul_(10)  # away from the norm's epsilon
    assert float(gate_scores(module, "weight").max()) < 1e-3 * float(gate_scores(module, "output").max())


# the callback


def test_channels_leave_with_their_norm_and_bias_and_count_exactly() -> None:
    module = spread(chain())
    receipt = prune(module, ProsPr(sparsity=0.6, structured=True, steps=2), batches(), entropy)
    masks = MaskManager.of(module).masks
    kept = {index: masks[f"{index}.weight"].flatten(1).any(1) for index in (0, 4)}
    assert sum(int(value.sum()) for value in kept.values()) == 9 - 5
    assert all(bool(value.any()) for value in kept.values())
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(masks[name], kept[0])
    assert torch.equal(masks["0.weight"], kept[0].view(4, 1, 1, 1).expand(4, 1, 3, 3))
    assert bool(masks["8.weight"].all())
    left = int(kept[0].sum()), int(kept[4].sum())
    after = left[0] * (9 + 1 + 2) + left[1] * (left[0] * 9 + 1) + 3 * (left[1] + 1)
    assert f"4 of 9 output channels are kept; cut out, {after} of 251 parameters are left." in receipt.notes
    assert "8.weight: outputs of the network, all kept." in receipt.notes


def test_a_removed_channel_is_silent() -> None:
    module = spread(chain())
    prune(module, ProsPr(sparsity=0.6, structured=True), batches(), entropy)
    kept = MaskManager.of(module).masks["1.weight"]
    features = module[:3](batches(1)[0][0]).detach()
    assert float(features[:, ~kept].abs().max()) == 0.0
    assert bool((features[:, kept].abs().amax((0, 2, 3)) > 0).all())


def test_rounds_only_remove_more_channels() -> None:
    module = spread(chain())
    prune(module, ProsPr(sparsity=0.3, structured=True), batches(), entropy)
    before = MaskManager.of(module).masks
    prune(module, ProsPr(sparsity=0.6, structured=True, rounds=3, gate="weight"), batches(), entropy)
    after = MaskManager.of(module).masks
    assert all(bool((before[name] | ~after[name]).all()) for name in before)
    assert sum(int(after[f"{i}.weight"].flatten(1).any(1).sum()) for i in (0, 4)) == 4


def test_the_meta_gradient_of_a_channel_is_that_of_its_gate() -> None:
    """Central difference of the meta-loss by one multiplier of a channel's norm, weight and bias."""
    from lightning_prune.curvature import point_of, replayed_losses
    from lightning_prune.methods.prospr import InnerSGD, meta_gradient
    from lightning_prune.objective import Objective

    module = spread(chain()).double()
    data = [(images.double(), labels) for images, labels in batches()]
    objective = Objective(module, lambda count: data[:count], entropy)
    sgd = InnerSGD(3, 0.1, 0.9)
    with replayed_losses(objective, 0, second_order=True) as losses:
        path, start = losses(data), point_of(module)
        slopes, _ = meta_gradient(path, start, sgd, ["1.weight", "1.bias"])
        score = sum(start[name][2] * slopes[name][2] for name in slopes)

        def meta_loss(gate: float) -> float:
            moved: Mapping[str, Any] = {name: value.clone() for name, value in start.items()}
            moved["1.weight"][2] *= gate
            moved["1.bias"][2] *= gate
            return meta_gradient(path, moved, sgd, ["1.weight"], mode="first_order")[1][-1]

        slope = (meta_loss(1 + 1e-6) - meta_loss(1 - 1e-6)) / 2e-6
    assert float(score) == pytest.approx(slope, rel=1e-5)
