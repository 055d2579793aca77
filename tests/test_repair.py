"""Repair: against least squares by hand, averages by hand, and what may not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.repair import (
    RepairReport,
    features,
    reestimate_batch_norm,
    refit_consumers,
    repair,
    run_batch,
)


def batches(count: int = 8, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(shape[-1], shape[-1], generator=generator) if len(shape) == 2 else None
    drawn = [torch.randn(*shape, generator=generator) for _ in range(count)]
    return drawn if mix is None else [x @ mix for x in drawn]


def pruned_pair() -> tuple[nn.Sequential, nn.Sequential]:
    """6 -> 8 -> 3 with hidden units 1, 4 and 6 masked, and the dense net."""
    dense = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[2].weight[:, [1, 4, 6]] = 0
    return pruned, dense


def test_refit_solves_the_ridge_problem_of_the_kept_inputs():
    pruned, dense = pruned_pair()
    data, kept = batches(8, 32, 6), [0, 2, 3, 5, 7]
    hidden = torch.cat([dense[1](dense[0](x)) for i, x in enumerate(data) if i % 4 != 3]).double().detach()
    gram = hidden[:, kept].T @ hidden[:, kept]
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    target = hidden @ dense[2].weight.double().T
    expected = torch.linalg.solve(gram + ridge, hidden[:, kept].T @ target).T
    report = refit_consumers(pruned, dense, data)
    assert torch.allclose(pruned[2].weight[:, kept].double(), expected, atol=1e-6)
    assert (pruned[2].weight[:, [1, 4, 6]] == 0).all()
    before, after = report.refit["2"]
    assert after < before
    assert torch.equal(pruned[2].bias, dense[2].bias)


def test_reported_errors_are_those_of_held_out_batches():
    pruned, dense = pruned_pair()
    data = batches(4, 32, 6)
    x = dense[1](dense[0](data[3])).detach()
    want = (x @ dense[2].weight.T).detach()
    missed = (x @ pruned[2].weight.T - want).detach()
    before = float((missed**2).sum() / (want**2).sum())
    report = refit_consumers(pruned, dense, data)
    after = float(((x @ pruned[2].weight.detach().T - want) ** 2).sum() / (want**2).sum())
    assert report.refit["2"] == pytest.approx((before, after), rel=1e-4)


def test_later_consumers_are_refit_on_the_repaired_network():
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[2].weight[:, :3] = 0
        pruned[4].weight[:, 5:] = 0
    data = batches(12, 64, 6)

    def miss() -> float:
        return float(sum(((pruned(x) - dense(x)) ** 2).sum() for x in data).detach())

    before = miss()
    report = refit_consumers(pruned, dense, data)
    assert list(report.refit) == ["2", "4"]
    assert miss() < 0.6 * before


def test_convolution_features_reproduce_the_convolution():
    for layer, shape in (
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 9)),
        (nn.Conv2d(3, 4, (3, 1), padding="same"), (2, 3, 5, 6)),
        (nn.Conv1d(3, 4, 4, stride=3), (2, 3, 11)),
        (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 4, 3)),
        (nn.Linear(5, 2), (2, 7, 5)),
    ):
        x = torch.randn(shape)
        flat = features(layer, x) @ layer.weight.flatten(1).T + layer.bias
        expected = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
        assert torch.allclose(flat, expected.reshape(flat.shape), atol=1e-5)


def test_refit_of_a_convolution_lowers_the_error():
    dense = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[2].weight[:, [0, 3]] = 0
    before, after = refit_consumers(pruned, dense, batches(8, 4, 2, 8, 8)).refit["2"]
    assert after < before
    assert (pruned[2].weight[:, [0, 3]] == 0).all()


def test_rows_that_are_gone_stay_gone():
    pruned, dense = pruned_pair()
    with torch.no_grad():
        pruned[2].weight[1] = 0
    refit_consumers(pruned, dense, batches(8, 32, 6))
    assert (pruned[2].weight[1] == 0).all()


@pytest.mark.parametrize("case", ["single zeros", "one batch", "too wide", "grouped"])
def test_what_is_not_refit_says_why(case, monkeypatch):
    pruned, dense = pruned_pair()
    data, words = (
        batches(8, 32, 6),
        {"single zeros": "single zeros", "one batch": "one batch", "too wide": "more than 4"},
    )
    if case == "single zeros":
        with torch.no_grad():
            pruned[2].weight[0, 0] = 0
    if case == "one batch":
        data = data[:1]
    if case == "too wide":
        monkeypatch.setattr("lightning_prune.repair.MAX_FEATURES", 4)
    if case == "grouped":
        dense = nn.Sequential(nn.Conv1d(6, 8, 1, groups=2))  # type: ignore[assignment]
        pruned = copy.deepcopy(dense)
        with torch.no_grad():
            pruned[0].weight[:, 0] = 0
        data = [x.reshape(-1, 6, 4) for x in data for x in [torch.randn(2, 6, 4)]]
    before = copy.deepcopy(pruned.state_dict())
    report = refit_consumers(pruned, dense, data)
    assert words.get(case, "grouped") in next(iter(report.skipped.values()))
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_a_refit_that_does_not_generalise_is_taken_back():
    pruned, dense = pruned_pair()
    fit, judge = torch.full((4, 6), 3.0), torch.randn(64, 6)
    before = pruned[2].weight.clone()
    with torch.no_grad():  # the kept inputs already suffice where it is judged
        dense[2].weight[:, [1, 4, 6]] *= 1e-3
        dense[2].weight[:, [1, 4, 6]] += 1e-5
    report = refit_consumers(pruned, dense, [fit, judge], damping=10.0)
    assert report.refit == {}
    assert "does not lower the error" in report.skipped["2"]
    assert torch.equal(pruned[2].weight, before)


def test_batch_norm_statistics_become_averages_over_batches():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    data = batches(5, 16, 6)
    tracked = module[1].num_batches_tracked.clone()
    report = reestimate_batch_norm(module, data)
    outputs = [module[0](x).detach() for x in data]
    assert torch.allclose(module[1].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0), atol=1e-6)
    assert torch.allclose(module[1].running_var, torch.stack([y.var(0) for y in outputs]).mean(0), atol=1e-6)
    assert report.batch_norm == ["1"]
    assert report.samples == 80
    assert module[1].momentum == 0.1
    assert torch.equal(module[1].num_batches_tracked, tracked)


def test_only_batch_norm_runs_in_train_mode():
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    data = batches(2, 64, 6)
    reestimate_batch_norm(module, data)
    expected = torch.stack([module[1](x).mean(0) for x in data]).mean(0)
    assert torch.allclose(module[2].running_mean, expected, atol=1e-6)
    assert all(child.training for child in module.modules())


def test_reading_stops_after_enough_samples():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    assert reestimate_batch_norm(module, batches(9, 16, 6), max_samples=40).samples == 48


def test_without_batch_norm_nothing_is_read():
    assert reestimate_batch_norm(nn.Linear(2, 2), iter(())) == RepairReport()


@pytest.mark.parametrize("data", [[], [torch.randn(1, 6)], [torch.randn(3, 5)]])
def test_failure_leaves_the_statistics_alone(data):
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    module(torch.randn(8, 6))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="could not be re-estimated"):
        reestimate_batch_norm(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[1].momentum == 0.1


def test_repair_does_both_and_reports_plain_values():
    dense = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[3].weight[:, [1, 4]] = 0
    report = repair(pruned, dense, batches(8, 32, 6))
    assert set(report.to_dict()) == {"refit", "skipped", "batch_norm", "samples"}
    assert report.to_dict()["batch_norm"] == ["1"]
    assert len(report.to_dict()["refit"]["3"]) == 2
    assert repair(pruned, dense, batches(8, 32, 6), refit=False, batch_norm=False) == RepairReport()


def test_lightning_batches_go_through_the_step(tiny, dataset):
    images, labels = dataset[:8]
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    dense = copy.deepcopy(tiny)
    with torch.no_grad():
        tiny.head.weight[:, :4] = 0
    report = repair(tiny, dense, [(images, labels)] * 4)
    assert report.batch_norm == ["norm"]
    assert set(report.refit) | set(report.skipped) == {"head"}
    assert not torch.equal(tiny.norm.running_mean, before["norm.running_mean"])


def test_batches_reach_forward_in_every_form():
    class Two(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale

    x, two = torch.ones(2), Two()
    assert torch.equal(run_batch(two, x), x)
    assert torch.equal(run_batch(two, (x, 3.0)), 3 * x)
    assert torch.equal(run_batch(two, {"x": x, "scale": 2.0}), 2 * x)
    assert torch.equal(run_batch(nn.Identity(), [x, torch.zeros(3)]), x)
    assert torch.equal(F.relu(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "`damping` must be a finite number above 0"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str):
    pruned, dense = pruned_pair()
    with pytest.raises(ValueError, match=message):
        refit_consumers(**{"module": pruned, "dense": dense, "batches": batches(2, 8, 6), **arguments})


def test_a_teacher_of_another_shape_is_refused():
    pruned, _ = pruned_pair()
    with pytest.raises(ValueError, match="`dense` must be the module before pruning"):
        refit_consumers(pruned, nn.Sequential(nn.Linear(6, 7)), batches(2, 8, 6))


def test_a_wrong_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="`max_samples` must be an integer >= 1"):
        reestimate_batch_norm(nn.Linear(2, 2), [], max_samples=0)
