"""ChipNet in a fit: soft gates, hardening, the reference's settings."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    Watch,
    fit,
    leaks,
    masks_of,
    toy,
    toy_loader,
    weights_of,
)
from lightning.pytorch import Callback
from methods.chipnet_cases import SOFT, chipnet, traced
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ChipNet, MaskManager
from lightning_prune.cost import KINDS, CostModel
from lightning_prune.dependency import channel_groups

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*exists and is not empty")]


# the soft phase


def test_gates_move_while_they_are_soft_and_then_never_again() -> None:
    _, callback, trace = traced(max_epochs=3, callback=chipnet(prune_fraction=SOFT))
    assert all(not torch.equal(a, b) for a, b in zip(trace.psi[: SOFT - 1], trace.psi[1:SOFT], strict=True))
    assert all(torch.equal(psi, trace.psi[SOFT - 1]) for psi in trace.psi[SOFT:])
    assert [event["step"] for event in callback.history] == [SOFT]


def test_statistics_are_frozen_while_gates_are_soft_and_move_afterwards() -> None:
    _, _, trace = traced()
    assert all(torch.equal(mean, trace.means[0]) for mean in trace.means[: SOFT - 1])
    assert not torch.equal(trace.means[SOFT - 1], trace.means[0])  # re-estimated when the gates became hard
    assert all(not torch.equal(a, b) for a, b in zip(trace.means[SOFT - 1 :], trace.means[SOFT:], strict=False))
    assert trace.flags == [True] * 2 * STEPS


def test_statistics_of_the_batch_move_in_the_soft_phase_where_that_is_asked() -> None:
    _, _, trace = traced(callback=chipnet(bn_soft="train"))
    assert not torch.equal(trace.means[0], trace.means[SOFT - 2])


def test_a_norm_that_the_user_froze_stays_frozen() -> None:
    class Frozen(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.norm.eval()

    module, _, trace = traced(toy(kind=Frozen))
    assert trace.flags == [False] * 2 * STEPS
    assert torch.equal(trace.means[-1], trace.means[SOFT - 1])
    assert not module.norm.training


def test_statistics_are_measured_under_the_first_gates_before_they_are_frozen() -> None:
    _, _, settled = traced()
    _, _, as_it_was = traced(callback=chipnet(refit_bn=False))
    assert torch.equal(as_it_was.means[0], torch.zeros(4))
    assert not torch.equal(settled.means[0], torch.zeros(4))


def test_the_first_gate_gradient_is_that_of_the_loss_and_the_two_penalties() -> None:
    """One AdamW step from psi_0 against autograd through the whole expression, written out."""
    module, callback, seen = toy(), chipnet(prune_fraction=1.0, refit_bn=False, ste_last=0.0), {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not seen:
                gates = callback._soft.gates
                seen["average"] = gates.optimizer.state_dict()["state"][0]["exp_avg"].clone()

    psi_before: list[Tensor] = []

    class Before(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            psi_before.append(callback._soft.gates.psi.detach().clone())

    dense = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(module, Before(), callback, Look(), max_epochs=1)
    psi = psi_before[0].double().requires_grad_()
    x = torch.sigmoid(psi)
    z = 1 - torch.exp(-2 * x) + x * torch.exp(torch.tensor(-2.0)).double()
    conv, hidden = z[:4], z[4:]
    weights = {name: tensor.double() for name, tensor in dense.items() if tensor.is_floating_point()}
    weights["hidden.weight"] = weights["hidden.weight"] * conv.repeat_interleave(16)
    weights["head.weight"] = weights["head.weight"] * hidden
    fresh = toy().double()
    fresh.norm.eval()
    images, labels = next(iter(toy_loader()))
    out = torch.func.functional_call(fresh, weights, (images.double(),))
    m = torch.sigmoid(10 * (z - 0.5))
    a, b = m[:4].sum(), m[4:].sum()
    flops = 2 * (9 * 16 * a + 64 * b / 4 * a + 3 * b)
    share = flops / (2 * (9 * 16 * 4 + 64 * 12 + 36))
    total = nn.functional.cross_entropy(out, labels) + 30 * (share - 0.5) ** 2 + 10 * (z - x).square().mean()
    (expected,) = torch.autograd.grad(total, psi)
    torch.testing.assert_close(seen["average"].double() / 0.1, expected, rtol=1e-4, atol=1e-7)


def test_gates_have_an_optimizer_of_their_own() -> None:
    module, callback = toy(), chipnet()
    trainer = fit(module, callback)
    owned = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert owned == len(list(module.parameters()))


def test_accumulation_takes_one_gate_step_per_optimizer_step() -> None:
    callback = chipnet(gate_lr=10.0)
    _, _, trace = traced(callback=callback, accumulate_grad_batches=3, max_epochs=4)
    moved = [not torch.equal(a, b) for a, b in zip(trace.psi, trace.psi[1:], strict=False)]
    first = [index + 1 for index, change in enumerate(moved) if change]
    assert first == [2, 5, 8, 11]  # every third batch, four steps of eight
    assert callback.history[0]["step"] == 4


def test_accumulated_batches_give_the_gradient_of_one_large_batch() -> None:
    def psi(batch: int, **settings: Any) -> Tensor:
        callback = chipnet(prune_fraction=2, refit_bn=False)
        fit(toy(), callback, loader=torch.utils.data.DataLoader(toy_loader().dataset, batch), max_epochs=1, **settings)
        assert callback.psi is not None
        return callback.psi

    torch.testing.assert_close(psi(4, accumulate_grad_batches=3), psi(12), rtol=1e-4, atol=1e-3)


# hardening


@pytest.mark.parametrize("kind", KINDS)
def test_the_hard_budget_holds_and_one_more_channel_would_break_it(kind: str) -> None:
    module, callback = toy(), chipnet(0.6, budget_type=kind)
    fit(module, callback)
    certificate = callback.receipt.certificate
    assert certificate["cost"] <= certificate["limit"] < certificate["cost_with_the_next_channel"]
    groups = channel_groups(toy(), toy_loader().dataset.tensors[0][:4])
    masks = masks_of(module)
    kept = {"conv": int(masks["conv.weight"].flatten(1).any(1).sum()), "hidden": int(masks["head.weight"].any(0).sum())}
    assert CostModel(groups).cost(kind, kept) / CostModel(groups).cost(kind) == pytest.approx(
        certificate["cost"] / certificate["dense"]
    )


def test_kept_gates_are_folded_so_that_only_removed_channels_change_the_function() -> None:
    found: dict[str, Tensor] = {}
    images = toy_loader().dataset.tensors[0]

    class Outputs(Callback):
        """Soft output with the gates that will stay, then the output of the hard network."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == SOFT - 1:
                return
            pl_module.eval()
            if trainer.global_step == SOFT:
                name = "before" if callback._soft is not None else "after"
                if name == "before":
                    callback._soft.gates.reads.set(callback._soft.gates.hard_values())
                with torch.no_grad():
                    found[name] = pl_module(images)
            pl_module.train()

    for refit_bn in (False, True):  # new statistics do not change it either
        module, callback = toy(), chipnet(refit_bn=refit_bn, refit_consumers=False)
        fit(module, Outputs(), callback, Outputs())
        torch.testing.assert_close(found["after"], found["before"], rtol=1e-4, atol=1e-5)
        assert bool(callback.receipt.repair) == refit_bn


def test_without_folding_kept_weights_are_left_as_they_were() -> None:
    weights: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == SOFT:
                weights[f"{len(weights)}"] = weights_of(pl_module)

    module = toy()
    fit(module, Keep(), chipnet(fold=False, refit_bn=False, refit_consumers=False), Keep())
    for name, mask in masks_of(module).items():
        torch.testing.assert_close(weights["1"][name], weights["0"][name] * mask, rtol=0, atol=0)


def test_every_group_keeps_its_share() -> None:
    module = toy()
    fit(module, chipnet(0.4, min_keep=0.5))
    masks = masks_of(module)
    assert int(masks["conv.weight"].flatten(1).any(1).sum()) >= 2
    assert int(masks["hidden.weight"].any(1).sum()) >= 6


def test_without_a_share_every_group_keeps_half_of_the_uniform_width() -> None:
    module = toy()
    fit(module, chipnet(0.5, budget_type="channels"))
    masks = masks_of(module)
    kept = [int(masks["conv.weight"].flatten(1).any(1).sum()), int(masks["hidden.weight"].any(1).sum())]
    assert kept[0] >= 1  # a quarter of 4
    assert kept[1] >= 3  # a quarter of 12
    assert sum(kept) == 8


def test_what_reads_removed_channels_is_refit_to_the_soft_network() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(512, 1, 6, 6, generator=generator)
    many = DataLoader(TensorDataset(images, torch.zeros(512, dtype=torch.long)), batch_size=64)
    outputs: dict[str, Tensor] = {}

    class Look(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == SOFT:
                pl_module.eval()
                with torch.no_grad():
                    outputs[self.name] = pl_module(images)
                pl_module.train()

    def pruned(name: str, **arguments: Any) -> ChipNet:
        callback = chipnet(0.5, gate_lr=0.5, refit_bn=False, calibration_dataloader=many, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gates that cannot cross: they stay soft
            fit(toy(), Look("soft"), callback, Look(name))
        return callback

    refit = pruned("refit")
    assert refit.receipt.repair.startswith("2 consumers refit by least squares")
    cut = pruned("cut", refit_consumers=False)
    assert not cut.receipt.repair
    errors = {name: float((outputs[name] - outputs["soft"]).square().sum()) for name in ("refit", "cut")}
    assert errors["refit"] < errors["cut"]
    tail = pruned("tail", ste_last=0.5)  # it has learned to do without them
    assert not tail.receipt.repair


def test_gradients_of_weights_are_scaled_while_gates_are_soft() -> None:
    norms: dict[float, list[float]] = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms[rate].append(float(pl_module.conv.weight.grad.norm()))

    for rate in (1.0, 0.25, 0.0):
        norms[rate] = []
        fit(toy(), chipnet(weight_rate=rate), Look())
    assert norms[0.25][0] == pytest.approx(0.25 * norms[1.0][0], rel=1e-5)
    assert norms[0.0][:SOFT] == [0.0] * SOFT
    assert min(norms[0.0][SOFT:]) > 0  # fine-tuning has them all


def test_channels_pruned_before_count_as_gone() -> None:
    module = toy()
    gone = torch.ones(3, 12, dtype=torch.bool)
    gone[:, :5] = False
    MaskManager.of(module).set_masks({"head.weight": gone})
    callback = chipnet(0.5, budget_type="channels")
    fit(module, callback)
    assert not module.head.weight[:, :5].any()
    assert callback.psi is not None
    assert len(callback.psi) == 11  # 4 + 12 - 5
    assert callback.receipt.certificate["cost"] == 8


def test_kept_channels_are_rounded_down() -> None:
    module = toy()
    fit(module, chipnet(0.7, round_to=4))
    assert int(masks_of(module)["head.weight"].any(0).sum()) in (4, 8, 12)


# the reference's settings


def test_the_preset_takes_the_authors_settings() -> None:
    callback = ChipNet(0.5, preset="reference")
    assert (callback.coupling, callback.bn_soft, callback.ste_last) == ("per_layer", "train", 0.0)
    assert (callback.min_keep, callback.fold, callback.gate_lr, callback.refit_bn) == (0.0, False, 1e-3, False)


def test_an_argument_of_ones_own_wins_over_the_preset() -> None:
    callback = ChipNet(0.5, preset="reference", gate_lr=0.2, min_keep=0.3)
    assert (callback.gate_lr, callback.min_keep, callback.bn_soft) == (0.2, 0.3, "train")


def test_a_gate_per_channel_of_every_norm_prunes_within_the_budget() -> None:
    module, callback, watch = toy(), chipnet(0.25, budget_type="channels", preset="reference"), Watch()
    fit(module, callback, watch)
    certificate = callback.receipt.certificate
    assert certificate["cost"] <= certificate["limit"] < certificate["cost_with_the_next_channel"]
    gone = ~masks_of(module)["norm.weight"]
    assert gone.any()
    assert not module.norm.bias[gone].any()
    assert watch.found == [] == leaks(module)
