"""Shrinking a LightningModule with a batch of its own loader; optimizers, averages and plans that follow the shrink."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from dependency_nets import NETS
from lightning.pytorch import LightningModule, Trainer
from test_dependency_groups import Untraceable
from test_shrink_hybrid import blocks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lightning_prune._shrink_probe import masked
from lightning_prune.dependency import channel_groups
from lightning_prune.shrink import CutPlan, report_of, shrink

X, Y = torch.linspace(-1, 1, 24).reshape(4, 6), torch.linspace(0, 1, 12).reshape(4, 3)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)).relu())


class Fitted(LightningModule):
    """Takes the input and the target out of a batch by `take`, and calls itself, or its network where `direct`."""

    def __init__(self, take: Callable[[Any], tuple[Tensor, Tensor]], direct: bool = False) -> None:
        super().__init__()
        self.net, self.take, self.direct = Plain(), take, direct

    def forward(self, x: Tensor) -> Tensor:
        if self.direct:
            raise NotImplementedError
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.take(batch)
        loss = nn.functional.mse_loss(self.net(x) if self.direct else self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


BATCHES: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": ((X, Y), lambda batch: (batch[0], batch[1])),
    "list": ([X, Y], lambda batch: (batch[0], batch[1])),
    "dict": ({"x": X, "y": Y}, lambda batch: (batch["x"], batch["y"])),
    "nested": ({"in": [(X, None)], "out": {"y": (Y, 1)}}, lambda batch: (batch["in"][0][0], batch["out"]["y"][0])),
}


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_of_the_loader_gives_the_shrunk_network(kind, direct):
    batch, take = BATCHES[kind]
    module = Fitted(take, direct)
    kept = torch.tensor([True, False, True, True, False, False, True, True])
    small: Any = shrink(module, batch, {"net.a": kept})
    plain = shrink(module.net, X, {"a": kept})
    assert type(small) is Fitted
    assert report_of(small).units == {"net.a": (8, 5)}
    assert {name: tuple(t.shape) for name, t in small.net.state_dict().items()} == {
        name: tuple(t.shape) for name, t in plain.state_dict().items()
    }
    assert torch.equal(small.net(X), plain(X))
    assert report_of(small).plan.kept == {f"net.{name}": dims for name, dims in report_of(plain).plan.kept.items()}


@pytest.mark.parametrize("kind", BATCHES)
def test_the_shrunk_module_goes_on_with_its_own_step(kind, tmp_path):
    batch, take = BATCHES[kind]
    small: Any = shrink(Fitted(take), batch, {"net.a": torch.arange(8) < 3})
    before = small.net.a.weight.detach().clone()
    trainer = Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(small, DataLoader([batch], batch_size=None))
    assert small.net.a.weight.shape == (3, 6)
    assert not torch.equal(small.net.a.weight, before)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Tensor]]] = {
    "residual": (NETS["residual"][0], (2, 3, 8, 8), {"a": torch.arange(8) % 3 != 0, "b": torch.arange(8) < 6}),
    "hybrid": (
        blocks,
        (2, 5, 16),
        {"a": torch.arange(8) < 5, "blocks.0.qkv": torch.tensor([False, True, True, False])},
    ),
}


def masked_step(module: nn.Module, optimizer: Any, x: Tensor, hold: Callable[[nn.Module], Any]) -> None:
    """One step of a masked module: pruned weights are 0 in the forward pass, whatever their stored value."""
    optimizer.zero_grad()
    with hold(module):
        (module(x) ** 2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_optimizer_and_average_go_on_as_those_of_the_masked_module(case, optimizer):
    factory, shape, units = CASES[case]
    torch.manual_seed(0)
    module, x = factory().double(), torch.randn(shape, dtype=torch.float64)
    groups = channel_groups(module, x)
    removed = {name: torch.nonzero(~mask).ravel().tolist() for name, mask in units.items()}

    def hold(some: nn.Module) -> Any:
        return masked(some, [group for group in groups if group.name in units], removed)

    make = OPTIMIZERS[optimizer]
    dense = make(module.parameters())
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(3):
        masked_step(module, dense, x, hold)
        average.update_parameters(module)
    small, small_average = copy.deepcopy(module), copy.deepcopy(average)
    twin = make(small.parameters())
    twin.load_state_dict(copy.deepcopy(dense.state_dict()))
    plan = CutPlan.from_json(report_of(shrink(module, x, units, groups)).plan.to_json())
    plan.apply(small, [twin])
    plan.apply(small_average.module)
    for _ in range(2):
        masked_step(module, dense, x, hold)
        average.update_parameters(module)
        twin.zero_grad()
        (small(x) ** 2).mean().backward()
        twin.step()
        small_average.update_parameters(small)
    for whole, cut in ((module, small), (average.module, small_average.module)):
        expected = dict(whole.named_parameters())
        for name, parameter in cut.named_parameters():
            assert torch.allclose(parameter, plan.narrow(name, expected[name].detach()), rtol=1e-9, atol=1e-12), name


def test_factored_state_is_cut_along_the_dims_it_has():
    torch.manual_seed(0)
    factory, shape, units = CASES["residual"]
    module, x = factory(), torch.randn(shape)
    optimizer = torch.optim.Adafactor(module.parameters())
    (module(x) ** 2).mean().backward()
    optimizer.step()
    rows = optimizer.state[module.get_parameter("f.weight")]["col_var"].clone()
    report_of(shrink(module, x, units)).plan.apply(module, [optimizer])
    assert torch.equal(optimizer.state[module.get_parameter("f.weight")]["col_var"], rows[:, units["b"]])
    optimizer.zero_grad()
    (module(x) ** 2).mean().backward()
    optimizer.step()


# what cannot be done


def test_masks_of_another_model_are_refused_by_name():
    module, x = NETS["residual"][0](), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"must be one of the groups \(a, b\), got 'encoder.0'"):
        shrink(module, x, {"encoder.0": torch.ones(8, dtype=torch.bool)})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_example_of_the_wrong_shape_is_refused_before_anything_changed():
    with pytest.raises(
        ValueError, match=r"`example_input` must be accepted by Net.forward, got \(float32\[2, 4, 8, 8\]\)"
    ):
        shrink(NETS["residual"][0](), torch.randn(2, 4, 8, 8), {"a": torch.arange(8) < 4})


def test_a_batch_of_another_module_is_refused():
    module = Fitted(BATCHES["dict"][1])
    with pytest.raises(ValueError, match=r"`example_input` must be accepted by Fitted\.forward"):
        shrink(module, {"image": X}, {"net.a": torch.arange(8) < 4})


def test_a_module_that_cannot_be_exported_keeps_the_reason():
    module = Untraceable()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"export: .*no tracing here.*make_fx: .*Nothing was changed"):
        shrink(module, X)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Looking(nn.Module):
    """A branch on data: torch.export refuses it, a recorder sees the path that the example takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.relu() if bool(x.sum() > 0) else h.tanh())


def test_the_recorder_that_took_over_is_named_with_the_reason():
    small = shrink(Looking(), X, {"a": torch.arange(8) < 4})
    (note,) = report_of(small).notes
    assert note.startswith("The graph was recorded by draft_export, which sees one path only (export: ")
    assert "data-dependent" in note
    assert report_of(small).units == {"a": (8, 4)}
