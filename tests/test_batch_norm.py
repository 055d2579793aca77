"""BatchNorm statistics after pruning: the plain mean over batches, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.batch_norm import keep_function, refit_batch_norm, statistics_of


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def forward(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch)


def test_statistics_are_the_mean_over_batches() -> None:
    module = net().train()
    batches = [torch.randn(8, 3).double(), torch.randn(6, 3).double() + 1]
    assert refit_batch_norm(module, forward, batches) == 2
    inner = [module[0](batch) for batch in batches]
    assert torch.allclose(module[1].running_mean, (inner[0].mean(0) + inner[1].mean(0)) / 2)
    assert torch.allclose(module[1].running_var, (inner[0].var(0) + inner[1].var(0)) / 2)


def test_everything_else_stays_as_it_was() -> None:
    module = net().train()
    module[3].eval()
    before = {name: value.clone() for name, value in module.state_dict().items() if "running" not in name}
    refit_batch_norm(module, forward, [torch.randn(8, 3).double()] * 2)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert module[1].momentum == 0.1
    assert (module[0].training, module[1].training, module[3].training) == (True, True, False)


def test_random_states_are_restored() -> None:
    module = net()
    batches = [torch.randn(8, 3).double()]
    state = torch.get_rng_state()
    refit_batch_norm(module, lambda m, b: (torch.rand(3), m(b)), batches)
    assert torch.equal(state, torch.get_rng_state())


def test_a_failing_pass_brings_the_old_statistics_back() -> None:
    module = net()
    module[1].running_mean.fill_(3.0)

    def fails(m: nn.Module, batch: Tensor) -> None:
        m(batch)
        raise RuntimeError("out of batches")

    with pytest.raises(RuntimeError, match="out of batches"):
        refit_batch_norm(module, fails, [torch.randn(8, 3).double()])
    assert bool((module[1].running_mean == 3).all())
    assert module[1].momentum == 0.1


def test_without_batch_norm_nothing_is_run() -> None:
    calls: list[int] = []
    assert refit_batch_norm(nn.Linear(2, 2), lambda m, b: calls.append(1), [torch.zeros(2, 2)]) == 0
    assert not calls


def test_no_batch_is_refused_and_changes_nothing() -> None:
    module = net()
    module[1].running_var.fill_(2.0)
    with pytest.raises(ValueError, match="must hold at least one batch"):
        refit_batch_norm(module, forward, [])
    assert bool((module[1].running_var == 2).all())


def test_ranks_share_their_statistics() -> None:
    module = net()
    refit_batch_norm(module, forward, [torch.randn(8, 3).double()], reduce=lambda value: torch.full_like(value, 7.0))
    assert bool((module[1].running_mean == 7).all())
    assert bool((module[1].running_var == 7).all())


def test_new_statistics_leave_the_function_as_it_was_where_that_is_asked() -> None:
    module = net().eval()
    module[1].weight.data.uniform_(-2, 2)
    module[1].weight.data[1] = 0.0  # a removed channel stays removed
    module[1].bias.data[1] = 0.0
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    x = torch.randn(16, 3).double()
    before, old = module(x), statistics_of(module)
    refit_batch_norm(module, forward, [x, x + 1])
    assert not torch.allclose(module(x), before)  # new statistics alone change it
    new = statistics_of(module)
    keep_function(module, old, new)
    assert torch.allclose(module(x), before)
    assert torch.equal(module[1].running_mean, new["1"][0])
    assert module[1].weight[1] == module[1].bias[1] == 0


def test_a_layer_without_weight_and_bias_gets_the_statistics_alone() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3, affine=False)).eval()
    old, new = statistics_of(module), {"0": (torch.ones(3), torch.full((3,), 4.0))}
    keep_function(module, old, new)
    assert torch.allclose(module(torch.full((2, 3), 3.0)), torch.ones(2, 3))
