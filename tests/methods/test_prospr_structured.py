"""Structured ProsPr: where the gate of a channel sits, what leaves with it, what stays whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import MaskManager, ProsPr, channel_groups, prune, shrink
from lightning_prune.curvature import point_of, replayed_losses
from lightning_prune.methods._prospr_channels import ChannelUnits, gated_slabs, norms_after
from lightning_prune.methods.prospr import InnerSGD, meta_gradient
from lightning_prune.objective import Objective

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:.*smaller than the logging interval",
)
Batch = tuple[Tensor, Tensor]


def entropy(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def spread(module: nn.Module) -> nn.Module:
    """Give norms weights and biases that differ per channel, as no initialization does."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d) and child.affine:
                child.weight.uniform_(0.5, 1.5)
                child.bias.uniform_(-0.5, 0.5)
    return module


def chain(affine: bool = True) -> nn.Module:
    """conv - norm - ReLU - pool - conv - ReLU - mean - linear on images of 1 x 6 x 6."""
    return spread(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4, affine=affine),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        )
    )


class Residual(nn.Module):
    """A stem, one residual block with norms, a depthwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.point_norm = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depth, self.depth_norm = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        spread(self)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.stem_norm(self.stem(images)))
        stream = torch.relu(stream + self.norm(self.conv(stream)))
        wide = torch.relu(self.point_norm(self.point(stream)))
        return self.head(torch.relu(self.depth_norm(self.depth(wide))).mean((2, 3)))


def batches(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 6, 6, generator=generator), torch.arange(8) % 3) for _ in range(count)]


def norms_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    return norms_after(entropy(module, batches(1)[0]), dict(module.named_parameters()))


def gates_of(module: nn.Module, gate: str) -> dict[str, list[tuple[str, int]]]:
    groups = channel_groups(module, batches(1)[0][0])
    return {group.name: gated_slabs(group, groups.analysis.sizes, norms_of(module), gate) for group in groups}


# where the gate sits


def test_the_norm_that_follows_a_layer_is_found() -> None:
    assert norms_of(chain()) == {"0.weight": ("1.weight", "1.bias")}
    assert norms_of(chain(affine=False)) == {"0.weight": ()}


def test_a_norm_after_a_linear_layer_is_found_with_and_without_bias() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)
    )
    assert norms_of(module) == {"1.weight": ("2.weight", "2.bias"), "3.weight": ("4.weight", "4.bias")}


@pytest.mark.parametrize(
    ("gate", "first", "second"),
    [
        ("output", [("1.weight", 0), ("1.bias", 0)], [("4.weight", 0), ("4.bias", 0)]),
        ("weight", [("0.weight", 0)], [("4.weight", 0)]),
        ("consumer", [("4.weight", 1)], [("8.weight", 1)]),
    ],
)
def test_the_gate_sits_where_it_is_asked_to(gate: str, first: list[Any], second: list[Any]) -> None:
    assert gates_of(chain(), gate) == {"0": first, "4": second}


def test_layers_that_are_summed_share_a_gate_on_all_their_norms() -> None:
    gates = gates_of(Residual(), "output")
    assert sorted(gates["stem"]) == [
        ("norm.bias", 0),
        ("norm.weight", 0),
        ("stem_norm.bias", 0),
        ("stem_norm.weight", 0),
    ]
    assert {name for name, _ in gates["point"]} == {
        "point_norm.weight", "point_norm.bias", "depth_norm.weight", "depth_norm.bias",
    }  # fmt: skip


def test_a_norm_without_parameters_moves_the_gate_to_the_consumer() -> None:
    assert gates_of(chain(affine=False), "output")["0"] == [("4.weight", 1)]


# what the gate measures


def scores_of(module: nn.Module, gate: str) -> dict[str, Tensor]:
    """|dL/dc| of all channels at M = 0, on the first batch."""
    images, labels = batches(1)[0]
    leaves = dict(module.named_parameters())
    loss = entropy(module, (images.to(next(module.parameters()).dtype), labels))
    alive = {name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in leaves.items() if leaf.dim() > 1}
    groups = channel_groups(module, images.to(loss.dtype))
    units = ChannelUnits(module, groups, norms_after(loss, leaves), gate, alive)
    slopes = torch.autograd.grad(loss, [leaves[name] for name in units.wanted])
    return units.scores({n: (leaves[n] * slope).detach() for n, slope in zip(units.wanted, slopes, strict=True)})


def test_the_gate_after_the_norm_equals_the_gate_at_the_consumer_without_inner_steps() -> None:
    module = chain().double()
    ours, theirs = scores_of(module, "output"), scores_of(module, "consumer")
    assert all(float(score.min()) > 0 for score in theirs.values())
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-11, atol=0) for name in theirs)


def test_a_residual_stream_is_gated_as_a_whole() -> None:
    module = Residual().double()
    ours, theirs = scores_of(module, "output")["stem"], scores_of(module, "consumer")["stem"]
    images, labels = batches(1)[0]
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    scale = gate.view(4, 1, 1)
    stream = torch.relu(module.stem_norm(module.stem(images.double())) * scale)
    stream = torch.relu(stream + module.norm(module.conv(stream)) * scale)
    wide = torch.relu(module.point_norm(module.point(stream)))
    logits = module.head(torch.relu(module.depth_norm(module.depth(wide))).mean((2, 3)))
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), [gate])
    assert torch.allclose(ours, slope.abs(), rtol=1e-10, atol=0)
    assert torch.allclose(theirs, slope.abs(), rtol=1e-10, atol=0)


def test_the_gate_before_the_norm_sees_next_to_nothing() -> None:
    module = chain()
    module[0].bias = None
    with torch.no_grad():
        module[0].weight.mul_(10)  # away from the norm's epsilon
    assert float(scores_of(module, "weight")["0"].max()) < 1e-3 * float(scores_of(module, "output")["0"].max())


def test_the_meta_gradient_of_a_channel_is_the_derivative_by_its_gate() -> None:
    module = chain().double()
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


# the callback


def kept_channels(module: nn.Module, *names: str) -> list[Tensor]:
    masks = MaskManager.of(module).masks
    return [masks[name].flatten(1).any(1) for name in names]


def test_a_channel_leaves_everything_it_runs_through_and_the_count_is_exact() -> None:
    module = chain()
    receipt = prune(module, ProsPr(sparsity=0.6, structured=True, steps=2), batches(), entropy)
    masks = MaskManager.of(module).masks
    first, second = kept_channels(module, "0.weight", "4.weight")
    assert int(first.sum()) + int(second.sum()) == 9 - 5
    assert min(int(first.sum()), int(second.sum())) >= 1
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(masks[name], first)
    assert torch.equal(masks["0.weight"], first.view(4, 1, 1, 1).expand(4, 1, 3, 3))
    assert torch.equal(masks["4.weight"], (second.view(5, 1) & first).view(5, 4, 1, 1).expand(5, 4, 3, 3))
    assert torch.equal(masks["8.weight"], second.expand(3, 5))
    a, b = int(first.sum()), int(second.sum())
    after = a * (9 + 1 + 2) + b * (a * 9 + 1) + 3 * (b + 1)
    expected = f"4 of 9 channels are kept. With the others cut out, {after} of 251 parameters and "
    assert any(note.startswith(expected) for note in receipt.notes)
    assert "The outputs of 8.weight stay whole." in receipt.notes


@pytest.mark.parametrize("make", [chain, Residual])
def test_what_is_left_can_be_cut_out_and_computes_the_same(make: Callable[[], nn.Module]) -> None:
    module = make()
    prune(module, ProsPr(sparsity=0.5, structured=True), batches(), entropy)
    images = batches(1)[0][0]
    small = shrink(module, images)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (module, small))
    assert after < before
    assert torch.allclose(small.eval()(images), module.eval()(images), atol=1e-6)


def test_rounds_only_remove_more_channels() -> None:
    module = chain()
    prune(module, ProsPr(sparsity=0.3, structured=True), batches(), entropy)
    before = MaskManager.of(module).masks
    prune(module, ProsPr(sparsity=0.6, structured=True, rounds=3, gate="consumer"), batches(), entropy)
    after = MaskManager.of(module).masks
    assert all(bool((before[name] | ~after[name]).all()) for name in before)
    assert sum(int(kept.sum()) for kept in kept_channels(module, "0.weight", "4.weight")) == 4


def test_layer_scope_takes_the_same_share_of_every_group() -> None:
    module = chain()
    prune(module, ProsPr(sparsity=0.5, structured=True, scope="layer"), batches(), entropy)
    assert [int(kept.sum()) for kept in kept_channels(module, "0.weight", "4.weight")] == [2, 3]


class Lit(LightningModule):
    """A LightningModule that calls its network past its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = entropy(self.net, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_channels_stay_away_while_a_module_trains() -> None:
    data = TensorDataset(torch.randn(24, 1, 6, 6), torch.arange(24) % 3)
    module, callback = Lit(), ProsPr(sparsity=0.5, structured=True, measure=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=6))
    parameters = dict(module.named_parameters())
    masks = MaskManager.of(module).masks
    assert all(not bool(parameters[name][~mask].any()) for name, mask in masks.items())
    (kept,) = kept_channels(module, "net.point.weight")
    assert not bool(parameters["net.depth_norm.bias"][~kept].any())
    assert any(note.startswith("5 of 10 channels are kept") for note in callback.history[0]["notes"])


def test_groups_that_run_through_other_weights_stay_whole() -> None:
    module = chain()
    prune(module, ProsPr(sparsity=0.5, structured=True, include=["0", "4"]), batches(), entropy)
    first, second = kept_channels(module, "0.weight", "4.weight")
    assert (int(first.sum()), int(second.sum())) == (2, 5)
    assert "8.weight" not in MaskManager.of(module).masks


def test_nothing_to_prune_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"there is no channel to prune: .*such as '4\.weight'\. Prune single weights"):
        prune(chain(), ProsPr(sparsity=0.5, structured=True, include=["0"]), batches(), entropy)
    lonely = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ValueError, match=r"there is no channel to prune: '1\.weight': it is an output"):
        prune(lonely, ProsPr(sparsity=0.5, structured=True), batches(), entropy)


def test_a_loss_that_does_not_call_forward_is_refused() -> None:
    def loss(module: Any, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(module.forward(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"does not call the module's forward\. Let it call"):
        prune(chain(), ProsPr(sparsity=0.5, structured=True), batches(), loss)
