"""Sub-modules whose code cannot follow a cut run as their own shrunk graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dependency_nets import Net, width_from_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune._shrink_probe import mask_units
from lightning_prune.dependency import channel_groups
from lightning_prune.shrink import load_shrunk, report_of, save_shrunk, shrink


def blocks(dropout: float = 0.0) -> nn.Module:
    """Two attention blocks that reshape by their input's width, and an output layer."""

    def run(net: Any, x: Tensor) -> Tensor:
        for block in net.blocks:
            x = x + block(x)
        return net.o(net.a(x).relu())

    stack = nn.ModuleList([width_from_input(dropout), width_from_input(dropout)])
    return Net(run, blocks=stack, a=nn.Linear(16, 8), o=nn.Linear(8, 3))


@pytest.fixture(scope="module")
def shrunk() -> tuple[nn.Module, nn.Module, Tensor]:
    """The masked module, the shrunk one and an input; other heads leave in each block."""
    torch.manual_seed(0)
    module, x = blocks().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    groups = channel_groups(module, x)
    units = {
        "a": torch.arange(8) < 5,
        "blocks.0.qkv": torch.tensor([True, False, True, False]),
        "blocks.1.qkv": torch.tensor([False, True, True, False]),
    }
    small = shrink(module, x, units, groups)
    mask_units(module, list(groups), {name: torch.nonzero(~mask).ravel().tolist() for name, mask in units.items()})
    return module, small, x


def test_blocked_groups_go_through_by_the_hybrid_route(shrunk):
    _, small, _ = shrunk
    report = report_of(small)
    assert report.refused == {}
    assert report.routes == {"a": "eager", "blocks.0.qkv": "hybrid", "blocks.1.qkv": "hybrid"}
    assert report.units["blocks.1.qkv"] == (4, 2)
    assert small.blocks[1].qkv.weight.shape == (24, 16)
    assert small.blocks[1].qkv.out_features == 24


@pytest.mark.parametrize("shape", [(2, 5), (4, 5), (3, 9)])
def test_it_agrees_with_the_mask_at_other_sizes(shrunk, shape):
    masked, small, _ = shrunk
    x = torch.randn(*shape, 16, dtype=torch.float64)
    for training in (False, True):
        expected, found = masked.train(training)(x).detach(), small.train(training)(x).detach()
        assert float((expected - found).abs().max() / expected.abs().max()) < 1e-9


@given(heads=st.lists(st.sampled_from(range(1, 15)), min_size=2, max_size=2), hidden=st.integers(1, 255))
@settings(max_examples=4, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_heads_may_leave(heads, hidden):
    torch.manual_seed(0)
    module, x = blocks().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    groups = channel_groups(module, x)
    kept = {"blocks.0.qkv": (heads[0], 4), "blocks.1.qkv": (heads[1], 4), "a": (hidden, 8)}
    units = {
        name: torch.tensor([bool(bits >> unit & 1) for unit in range(size)]) for name, (bits, size) in kept.items()
    }
    small = shrink(module, x, units, groups)
    assert report_of(small).refused == {}
    mask_units(module, list(groups), {name: torch.nonzero(~mask).ravel().tolist() for name, mask in units.items()})
    expected, found = module.eval()(x).detach(), small.eval()(x).detach()
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-9


def test_blocks_that_run_alike_share_one_graph_in_both_modes(shrunk):
    _, small, _ = shrunk
    first, second = (block._graphs for block in small.blocks)
    assert first[False][0] is first[True][0] is second[False][0]


def test_blocks_with_dropout_have_a_graph_of_their_own_in_train_mode():
    torch.manual_seed(0)
    module, x = blocks(dropout=0.5), torch.randn(2, 5, 16)
    units = {"blocks.0.qkv": torch.tensor([True, False, True, False])}
    small = shrink(module, x, units)
    assert report_of(small).routes == {"blocks.0.qkv": "hybrid"}
    block = small.blocks[0]
    assert int((block.eval()(x) == 0).sum()) == 0
    assert 0.3 < float((block.train()(x) == 0).float().mean()) < 0.7


def test_names_stay_and_training_goes_on(shrunk):
    masked, small, x = shrunk
    assert list(small.state_dict()) == list(masked.state_dict())
    small.zero_grad()
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_copy_runs(shrunk):
    _, small, x = shrunk
    assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_other_arguments_than_the_traced_ones_are_refused(shrunk):
    _, small, x = shrunk
    with pytest.raises(ValueError, match="must have the structure it was traced with"):
        small.blocks[0](x, x)


def test_it_comes_back_from_a_file(shrunk, tmp_path):
    _, small, x = shrunk
    path = tmp_path / "small.safetensors"
    save_shrunk(small, path)
    back = load_shrunk(lambda: blocks().double(), path)
    assert torch.equal(back.eval()(x), small.eval()(x))


def test_an_optimizer_state_follows():
    module, x = blocks(), torch.randn(2, 5, 16)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(x).sum().backward()
    optimizer.step()
    units = {"blocks.0.qkv": torch.tensor([True, False, True, False])}
    plan = report_of(shrink(module, x, units)).plan
    momentum = optimizer.state[module.blocks[0].o.weight]["momentum_buffer"].clone()
    plan.apply(module, [optimizer])
    kept = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    state = optimizer.state[module.blocks[0].o.weight]["momentum_buffer"]
    assert torch.equal(state, momentum[:, kept])
    optimizer.zero_grad()
    module(x).sum().backward()
    optimizer.step()


def deep(depth: int) -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        for block in net.blocks:
            x = x + block(x)
        return x

    return Net(run, blocks=nn.ModuleList([width_from_input() for _ in range(depth)]))


def test_more_blocks_need_no_more_trials_and_no_more_graphs():
    trials = {}
    for depth in (2, 6):
        module, x = deep(depth), torch.randn(2, 5, 16)
        small = shrink(module, x, {f"blocks.{n}.qkv": torch.arange(4) % 2 == n % 2 for n in range(depth)})
        assert report_of(small).refused == {}
        assert len({id(block._graphs[False][0]) for block in small.blocks}) == 1
        trials[depth] = report_of(small).trials
    assert trials[2] == trials[6]


class Whole(LightningModule):
    """Its own forward reshapes by the width of its input: no module around it could hold a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.blocks = nn.ModuleList([width_from_input()])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.blocks[0](x)).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(batch, length, width))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_module_that_blocks_itself_runs_as_one_graph(tmp_path):
    torch.manual_seed(0)
    module, x = Whole().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    groups = channel_groups(module, x)
    units = {"qkv": torch.tensor([True, False, True, True]), "blocks.0.qkv": torch.tensor([False, True, True, False])}
    small: Any = shrink(module, x, units, groups)
    report = report_of(small)
    assert report.refused == {}
    assert report.notes == ["The whole module runs as one exported graph."]
    assert isinstance(small, Whole)
    assert small.qkv.weight.shape == (36, 16)
    assert list(small.state_dict()) == list(module.state_dict())
    twin = copy.deepcopy(module)
    mask_units(twin, list(groups), {name: torch.nonzero(~mask).ravel().tolist() for name, mask in units.items()})
    for shape in ((2, 5), (4, 7)):
        y = torch.randn(*shape, 16, dtype=torch.float64)
        expected, found = twin(y).detach(), small(y).detach()
        assert float((expected - found).abs().max() / expected.abs().max()) < 1e-9
    small.training_step(x, 0).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    save_shrunk(small, tmp_path / "small.safetensors")
    assert torch.equal(load_shrunk(lambda: Whole().double(), tmp_path / "small.safetensors")(x), small(x))
    plan = report.plan
    assert torch.equal(plan.narrow("qkv.weight", module.qkv.weight.detach()), small.qkv.weight)


def test_a_batch_of_one_leaves_the_batch_free():
    torch.manual_seed(0)
    module, x = blocks(), torch.randn(1, 5, 16)
    small = shrink(module, x, {"blocks.0.qkv": torch.tensor([True, False, True, False])})
    assert report_of(small).routes == {"blocks.0.qkv": "hybrid"}
    one, three = torch.randn(1, 5, 16), torch.randn(3, 5, 16)
    for y in (one, three):
        assert torch.allclose(small(y), torch.cat([small(row[None]) for row in y]), atol=1e-6)


def test_sizes_and_numbers_that_a_graph_holds_are_checked():
    class Sized(nn.Module):
        """Takes its heads as an argument and reads a fixed length."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o, self.place = nn.Linear(16, 48), nn.Linear(16, 16), nn.Parameter(torch.randn(5, 16))

        def forward(self, x: Tensor, heads: int) -> Tensor:
            batch, length, width = x.shape
            q, k, v = self.qkv(x + self.place).reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))

    module, x = Net(lambda net, x: net.b(x, 4), b=Sized()), torch.randn(2, 5, 16)
    small: Any = shrink(module, x, {"b.qkv": torch.tensor([True, False, True, False])})
    assert report_of(small).refused == {}
    assert small(torch.randn(3, 5, 16)).shape == (3, 5, 16)
    with pytest.raises(ValueError, match=r"the sizes it was traced with, \['any', 5, 16\], got \[2, 1, 16\]"):
        small(torch.randn(2, 1, 16))
    with pytest.raises(ValueError, match="the sizes it was traced with, 4, got 2"):
        small.b(x, 2)
