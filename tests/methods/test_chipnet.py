"""ChipNet in a fit: schedule, gradients, hardening, checkpoints, ranks, precision, and every refusal."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_distributed import Record
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    Watch,
    fit,
    leaks,
    make_trainer,
    masks_of,
    same,
    toy,
    toy_loader,
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ChipNet, MaskManager, prune
from lightning_prune.channels import Channels
from lightning_prune.cost import KINDS, CostModel
from lightning_prune.dependency import channel_groups
from lightning_prune.methods._chipnet_hooks import GatedReads
from lightning_prune.methods._chipnet_layout import build_layout
from lightning_prune.methods._chipnet_training import GateTraining, Plan
from lightning_prune.targets import select

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*exists and is not empty")]
SOFT = STEPS  # half of a two-epoch fit


def chipnet(budget: float = 0.5, **arguments: Any) -> ChipNet:
    return ChipNet(budget, **{"gate_lr": 5.0, "measure": False, "refit_bn_batches": 2, **arguments})


class Trace(Callback):
    """Keeps psi, the temperature and the norm's statistics after every batch."""

    def __init__(self, callback: ChipNet) -> None:
        self.callback = callback
        self.psi: list[Tensor] = []
        self.gammas: list[float] = []
        self.means: list[Tensor] = []
        self.flags: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        soft = self.callback._soft
        psi = self.callback.psi if soft is None else soft.gates.psi
        self.psi.append(psi.detach().cpu().clone())
        self.gammas.append(float("inf") if soft is None else soft.gates.temperature.gamma)
        self.means.append(pl_module.norm.running_mean.clone())
        self.flags.append(pl_module.norm.training)


def traced(module: Any = None, callback: ChipNet | None = None, **settings: Any) -> tuple[Any, ChipNet, Trace]:
    module = toy() if module is None else module
    callback = chipnet() if callback is None else callback
    trace = Trace(callback)
    fit(module, callback, trace, **settings)
    return module, callback, trace


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


# schedule and travel


def training(plan: Plan) -> GateTraining:
    """Gates of a 3-layer perceptron alone, without a loss: 60 + 40 units."""
    module = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 5))
    selected = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in select(module).items()}
    layout = build_layout(Channels(module, channel_groups(module, torch.randn(2, 20)), selected))
    reads = GatedReads(layout.slots, dict.fromkeys(("2.weight", "4.weight"), 2), torch.device("cpu"))
    psi = torch.rand(layout.size, generator=torch.Generator().manual_seed(0)) * 0.01
    return GateTraining(layout, reads, plan, psi)


def annealed(soft_steps: int, travel: float) -> dict[str, Any]:
    """The gates at the end of a soft phase under task gradients that differ from gate to gate and stay."""
    plan = Plan(0.25, "channels", soft_steps, 20, travel / soft_steps, 30.0, 10.0, soft_steps + 1, 0.0, 1, True)
    gates = training(plan)
    slopes = torch.randn(gates.layout.size, generator=torch.Generator().manual_seed(1)) * 0.05
    for step in range(soft_steps):
        gates.go_to(step)
        gates.update(slopes)
    return gates.describe()


@pytest.mark.parametrize("soft_steps", [200, 600])
def test_gates_that_travel_40_settle_at_the_budget(soft_steps: int) -> None:
    found = annealed(soft_steps, 40.0)
    assert abs(found["above_half_share"] - 0.25) < 0.05
    assert found["crispness"] < 0.03


def test_gates_that_travel_12_settle_at_the_budget_but_stay_grey() -> None:
    found = annealed(200, 12.0)
    assert abs(found["above_half_share"] - 0.25) < 0.05
    assert found["crispness"] > 0.1


def test_gates_that_cannot_cross_all_end_on() -> None:
    assert annealed(200, 0.2)["above_half_share"] == 1.0


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    gates = training(Plan(0.25, "params", 10, 20, 1.0, 30.0, 10.0, 11, 0.0, 1, True))
    before = gates.psi.detach().clone()
    assert gates.update(torch.full((gates.layout.size,), float("inf"))) is False
    assert torch.equal(gates.psi, before)
    assert gates.update(torch.zeros(gates.layout.size)) is True
    assert not torch.equal(gates.psi, before)


def test_the_tail_is_hard_forward_and_soft_backward() -> None:
    plan = Plan(0.25, "params", 10, 20, 1.0, 30.0, 10.0, 8, 0.0, 1, False)
    gates = training(plan)
    gates.go_to(7)
    torch.testing.assert_close(gates.reads._flat, gates.values()[gates.reads.index])
    gates.go_to(8)
    hard = gates.hard().float()
    torch.testing.assert_close(gates.reads._flat, hard[gates.reads.index])
    before = gates.psi.detach().clone()
    gates.update(torch.ones(gates.layout.size))
    assert bool((gates.psi != before).all())


# life cycle


class Saver(ModelCheckpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("at", [2, 5, SOFT, SOFT + 2])
def test_a_run_that_resumes_equals_one_that_was_never_stopped(at: int, tmp_path: Path) -> None:
    whole, first, _ = traced(module=toy(), callback=chipnet(), loader=None)
    again, second = toy(), chipnet()
    fit(again, second, Saver(tmp_path), loader=Sequential(), enable_checkpointing=True)
    assert same(weights_of(whole), weights_of(again))
    resumed, third = toy(seed=9), chipnet()
    fit(resumed, third, ckpt_path=tmp_path / f"step={at}.ckpt", loader=Sequential())
    assert same(weights_of(resumed), weights_of(whole))
    assert same(masks_of(resumed), masks_of(whole))
    assert first.psi is not None
    assert torch.equal(third.psi, first.psi)
    assert third.stage_records == second.stage_records == first.stage_records


class Sequential(torch.utils.data.DataLoader):
    """The toy's batches in order, going on where a checkpoint left off."""

    def __init__(self) -> None:
        super().__init__(toy_loader().dataset, batch_size=4)
        self.position = 0

    def __iter__(self) -> Any:
        self.position %= STEPS
        while self.position < STEPS:
            chosen = slice(4 * self.position, 4 * self.position + 4)
            self.position += 1
            yield [tensor[chosen] for tensor in self.dataset.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_without_the_gates_of_the_checkpoint_the_run_would_be_another(tmp_path: Path) -> None:
    """The negative control of the test above."""
    whole, _, _ = traced()
    fit(toy(), chipnet(), Saver(tmp_path), loader=Sequential(), enable_checkpointing=True)
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["lightning_prune.chipnet"]["gates"] = None
    torch.save(checkpoint, path)
    other = toy(seed=9)
    fit(other, chipnet(), ckpt_path=path, loader=Sequential())
    assert not same(weights_of(other), weights_of(whole))


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    fit(toy(), chipnet(), Saver(tmp_path), enable_checkpointing=True)
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["lightning_prune.chipnet"]["gates"]["signature"][0][1] = 7
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"the checkpoint's gates belong to the groups \[\['conv', 7\]"):
        fit(toy(), chipnet(), ckpt_path=path)


def test_the_soft_phase_may_begin_later() -> None:
    module, callback, watch = toy(), chipnet(begin=STEPS, prune_fraction=3), Watch()
    fit(module, callback, watch)
    assert [event["step"] for event in callback.history] == [STEPS + 3]
    assert watch.found == [] == leaks(module)
    assert watch.pruned_steps == STEPS - 3


def test_fine_tuning_may_be_a_fit_of_its_own() -> None:
    module, callback = toy(), chipnet(prune_fraction=1.0)
    fit(module, callback)
    masks, psi = masks_of(module), callback.psi
    fit(module, callback)
    assert same(masks_of(module), masks)
    assert callback.psi is psi
    assert leaks(module) == []


def test_a_fit_that_ends_before_the_gates_begin_says_so() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = True

    callback = chipnet(begin=STEPS + 2, prune_fraction=3)
    with pytest.warns(UserWarning, match="training ended before `begin`, so nothing was pruned"):
        fit(toy(), callback, Stop(), min_epochs=1)
    assert callback.history == []


def test_a_fit_that_ends_in_the_soft_phase_is_hardened_there() -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = True

    module, callback = toy(), chipnet(prune_fraction=1.0)
    with pytest.warns(UserWarning, match="training ended before its last planned step"):
        fit(module, callback, Stop(), min_epochs=1)
    assert callback.receipt.certificate["cost"] <= callback.receipt.certificate["limit"]
    assert leaks(module) == []


# ranks, precision, averages


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")
@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_gates_are_equal_on_both_ranks(tmp_path: Path) -> None:
    class RecordPsi(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if callback._soft is not None:
                path = tmp_path / f"psi{trainer.global_rank}.pt"
                torch.save([*torch.load(path), callback._soft.gates.psi.detach()] if path.exists() else [], path)

    callback = chipnet(gate_lr=7.0)
    fit(toy(), callback, RecordPsi(), Record(tmp_path), strategy="ddp_fork", devices=2, max_epochs=3)
    one, two = (torch.load(tmp_path / f"psi{rank}.pt") for rank in range(2))
    assert len(one) >= 2
    assert same(one, two)
    held = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(held[0]["masks"], held[1]["masks"])
    assert sum(int((~mask).sum()) for mask in held[0]["masks"].values()) > 0


def test_the_scale_of_the_gradient_scaler_is_divided_out() -> None:
    def gradients(scale: float) -> Tensor:
        callback, seen = chipnet(prune_fraction=4, refit_bn=False), []

        class Look(Callback):
            def on_before_optimizer_step(self, *args: Any) -> None:
                if callback._soft is not None:
                    seen.append(callback._soft.gates.optimizer.state_dict()["state"][0]["exp_avg"].clone())

        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fit(toy(), callback, Look(), plugins=[plugin], max_epochs=1)
        return seen[0]

    torch.testing.assert_close(gradients(2.0**4), gradients(2.0**8), rtol=2e-2, atol=1e-4)


def test_averaged_weights_take_the_gates_over_and_are_sparse() -> None:
    shadows: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module
            live, copy_ = dict(pl_module.named_parameters()), dict(average.named_parameters())
            if trainer.global_step == SOFT:
                ratio = (copy_["head.weight"].norm() / live["head.weight"].norm()).item()
                shadows.append((leaks(average, masks_of(pl_module)), ratio))

    module, watch = toy(), Watch()
    fit(module, EMAWeightAveraging(decay=0.5), chipnet(), Look(), watch)
    assert len(shadows) == 1
    assert shadows[0][0] == []
    assert 0.5 < shadows[0][1] < 2
    assert watch.found == [] == leaks(module)


def test_masks_of_one_network_hold_on_another(tmp_path: Path) -> None:
    host = toy()
    fit(host, chipnet())
    MaskManager.of(host).save(tmp_path / "masks.safetensors")
    other, watch, callback = toy(seed=7), Watch(), chipnet()
    MaskManager.of(other).load(tmp_path / "masks.safetensors")
    optimizer = other.configure_optimizers()
    MaskManager.of(other).attach([optimizer])
    for batch in toy_loader():
        optimizer.zero_grad()
        other.loss(batch).backward()
        optimizer.step()
    assert same(sorted(masks_of(other).items()), sorted(masks_of(host).items()))
    assert leaks(other) == []
    fit(other, callback, watch)  # which finds that nothing is left to remove
    assert watch.found == []
    assert same(sorted(masks_of(other).items()), sorted(masks_of(host).items()))
    assert callback.receipt.certificate["cost"] <= callback.receipt.certificate["limit"]


# metrics


def test_the_monitored_metric_is_the_hard_one() -> None:
    class Look(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking and trainer.global_step < SOFT:
                gates = callback._soft.gates
                gates.reads.set(gates.hard_values())
                with torch.no_grad():
                    pl_module.eval()
                    hard = float(pl_module.loss(next(iter(toy_loader()))))
                    gates.reads.set(gates.values())
                    soft = float(pl_module.loss(next(iter(toy_loader()))))
                gates.refresh()
                found.append((float(trainer.callback_metrics["val_loss"]), hard, soft))

    found: list[tuple[float, float, float]] = []
    callback = chipnet(0.3, ste_last=0.0, gate_lr=1.0)
    module = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(callback, Look(), val_check_interval=3, limit_val_batches=1)
        trainer.fit(module, toy_loader(), toy_loader())
    logged, hard, soft = found[0]
    assert logged == pytest.approx(hard, rel=1e-5)
    assert abs(soft - hard) > 1e-3


def test_soft_and_hard_metrics_are_logged_after_every_stage(tmp_path: Path) -> None:
    callback = chipnet(stages=3)
    fit(toy(), callback, logger=CSVLogger(tmp_path, name="", version=""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    for name in ("soft_loss", "hard_loss", "soft_share", "hard_share", "crispness", "stage"):
        filled = [row.split(",")[columns.index(f"prune/{name}")] for row in rows]
        assert len([value for value in filled if value]) == 3
    assert [record["stage"] for record in callback.stage_records] == [0, 1, 2]
    assert all(sum(record["histogram"]) == 16 for record in callback.stage_records)
    assert all(record["hard_share"] <= 0.5 for record in callback.stage_records)
    assert callback.receipt.certificate["stages"] == callback.stage_records


def test_looking_at_the_gates_does_not_disturb_the_run() -> None:
    quiet, loud = toy(dropout=0.4), toy(dropout=0.4)
    for module, batches in ((quiet, 0), (loud, 3)):
        torch.manual_seed(1)
        fit(module, chipnet(stage_batches=batches), loader=toy_loader(shuffle=True))
    assert same(weights_of(quiet), weights_of(loud))


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


# refusals


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.5, 25, None, "half", True, float("nan")])
def test_a_budget_outside_of_zero_to_one_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"`budget` must be in \(0, 1\]"):
        ChipNet(budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_type": "energy"}, "`budget_type` must be one of"),
        ({"prune_fraction": 0.0}, r"`prune_fraction` must be a float in \(0, 1\].*got 0.0"),
        ({"prune_fraction": 1.5}, r"`prune_fraction` must be a float in \(0, 1\]"),
        ({"prune_fraction": True}, "`prune_fraction` must be"),
        ({"begin": -1}, "`begin` must be an int >= 0"),
        ({"begin": 0.6, "prune_fraction": 0.6}, r"`begin` \+ `prune_fraction` must not exceed 1, got 0.6 \+ 0.6"),
        ({"stages": 0}, "`stages` must be an integer >= 1"),
        ({"travel": 0.0}, "`travel` must be a finite number above 0"),
        ({"gate_lr": -1.0}, "`gate_lr` must be a finite number above 0"),
        ({"w_budget": -1.0}, "`w_budget` must be a finite number >= 0"),
        ({"w_crisp": float("inf")}, "`w_crisp` must be a finite number >= 0"),
        ({"bn_soft": "eval"}, "`bn_soft` must be one of 'frozen', 'train'"),
        ({"weight_rate": 1.5}, r"`weight_rate` must be a number in \[0, 1\], got 1.5"),
        ({"refit_consumers": None}, "`refit_consumers` must be true or false"),
        ({"ste_last": 1.0}, r"`ste_last` must be in \[0, 1\)"),
        ({"min_keep": 1.0}, r"`min_keep` must be in \[0, 1\)"),
        ({"round_to": 0}, "`round_to` must be an integer >= 1"),
        ({"fold": 1}, "`fold` must be true or false"),
        ({"coupling": "none"}, "`coupling` must be one of 'graph', 'per_layer'"),
        ({"coupling": "per_layer", "round_to": 8}, "`round_to` must be 1 with coupling='per_layer'"),
        ({"stage_batches": -1}, "`stage_batches` must be an integer >= 0"),
        ({"hard_validation": None}, "`hard_validation` must be true or false"),
        ({"preset": "paper"}, "`preset` must be one of 'reference'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChipNet(0.5, **arguments)


def test_a_budget_below_the_smallest_cost_is_refused_before_anything_changes() -> None:
    module = toy()
    before = weights_of(module)
    with pytest.raises(ValueError, match=r"`budget` must be at least 0\.\d+ for 'flops'.*got 0.01"):
        fit(module, chipnet(0.01))
    assert same(weights_of(module), before)
    assert all(not child._forward_pre_hooks for child in module.modules())


def test_few_soft_steps_are_named_with_the_step_size_that_works() -> None:
    with pytest.warns(UserWarning, match=r"6 soft steps are few \(below 100\).*6\.67 per step.*gate_lr=6\.67"):
        fit(toy(), ChipNet(0.5, measure=False))


def test_gates_that_cannot_cross_are_named() -> None:
    with pytest.warns(UserWarning, match=r"cannot cross: 6 soft steps of 0\.001.*0\.006.*gate_lr=6\.67"):
        fit(toy(), chipnet(gate_lr=1e-3))


def test_a_travel_that_is_too_short_is_named() -> None:
    with pytest.warns(UserWarning, match=r"cannot cross: 6 soft steps of 0\.5 move psi by at most 3"):
        fit(toy(), ChipNet(0.5, travel=3.0, measure=False))


def test_a_network_without_channels_is_refused() -> None:
    class Single(Toy):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.conv = self.norm = self.hidden = nn.Identity()
            self.head = nn.Linear(36, 3)

    with pytest.raises(ValueError, match=r"there is no channel to prune: 'head\.weight'"):
        fit(toy(kind=Single), chipnet())


def test_weights_that_are_all_read_past_their_modules_are_refused() -> None:
    class Sneaky(Toy):
        def forward(self, images: Tensor) -> Tensor:
            features = torch.relu(self.norm(self.conv(images))).flatten(1)
            hidden = torch.relu(nn.functional.linear(features, self.hidden.weight)) + 0 * self.hidden(features)
            return nn.functional.linear(hidden, self.head.weight) + 0 * self.head(hidden)

    with pytest.raises(ValueError, match=r"there is no channel to gate.*read outside of the modules that hold them"):
        fit(toy(kind=Sneaky), chipnet())


def test_training_that_diverges_is_stopped_with_a_remedy() -> None:
    class Diverging(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1.0 if batch_idx < 2 else float("nan"))

    with pytest.raises(ValueError, match=r"gates is not finite at step 2: training diverges.*bn_soft='train'"):
        fit(toy(kind=Diverging), chipnet())


def test_pruning_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="learns its gates in a fit"):
        prune(toy(), chipnet(), toy_loader())


def test_a_fit_of_unknown_length_needs_steps() -> None:
    with pytest.raises(MisconfigurationException, match=r"`begin` and `prune_fraction` must be ints"):
        fit(toy(), chipnet(), max_epochs=-1)


def test_a_soft_phase_beyond_the_fit_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="beyond the fit of 12 optimizer steps"):
        fit(toy(), chipnet(prune_fraction=13))


def test_going_on_from_a_dense_checkpoint_past_the_beginning_is_refused(tmp_path: Path) -> None:
    fit(toy(), Saver(tmp_path), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"`begin` \(step 0\) lies before step 6"):
        fit(toy(), chipnet(), ckpt_path=tmp_path / f"step={STEPS}.ckpt")
