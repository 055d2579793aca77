"""ChipNet over a whole run: schedule, checkpoints, ranks, precision, averages, metrics."""

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
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from methods.chipnet_cases import SOFT, Saver, chipnet, traced
from torch import Tensor, nn

from lightning_prune import MaskManager
from lightning_prune.channels import Channels
from lightning_prune.dependency import channel_groups
from lightning_prune.methods._chipnet_hooks import GatedReads
from lightning_prune.methods._chipnet_layout import build_layout
from lightning_prune.methods._chipnet_training import GateTraining, Plan
from lightning_prune.targets import select

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*exists and is not empty")]


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
