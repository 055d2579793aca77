"""What ProsPr refuses, in one clear error, with the module as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from methods.prospr_cases import (
    QUIET,
    entropy,
    pruner,
    same,
    trainer_of,
    without_curvature,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import MaskManager, prune

pytestmark = QUIET
Loss = Callable[[Any, Any], Tensor]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(1, 4, 4), 0)] * 8)


def detached(module: Any, batch: Any) -> Tensor:
    return entropy(module, batch).detach()


def vector(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).mean(dim=0)


def endless(module: Any, batch: Any) -> Tensor:
    return entropy(module, batch) * torch.inf


@pytest.mark.parametrize(
    ("arguments", "loss", "message"),
    [
        (
            {"inner_lr": 1e30},
            entropy,
            r"not finite after \d of 3 inner steps, .*Choose `inner_lr` below 1e\+30",
        ),
        ({}, endless, "not finite before the first inner step"),
        ({}, detached, "does not depend on any parameter"),
        ({}, vector, "must return a scalar loss tensor"),
        ({}, without_curvature, "Use mode='first_order'"),
        ({"inner_lr": None}, entropy, "`inner_lr` must be a number where no Trainer has an optimizer"),
        ({"min_keep_per_layer": 20}, entropy, "`min_keep_per_layer`=20 keeps 60 entries of the 3 tensors"),
        (
            {"structured": True, "exclude": ["head"], "gate": "weight"},
            vector,
            "must return a scalar loss tensor",
        ),
    ],
)
def test_a_refusal_leaves_the_module_untouched(
    arguments: dict[str, Any], loss: Loss, message: str, tiny: Any, loader: DataLoader
) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    state = torch.get_rng_state()
    batches = list(DataLoader(loader.dataset, batch_size=4))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        prune(tiny, pruner(**arguments), batches, loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(dict(tiny.state_dict()), before)
    assert MaskManager.of(tiny).masks == {}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())


def refused_fit(module: Any, loader: Any, callback: Callback, message: str) -> None:
    """The fit raises, and leaves every weight as it was."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer_of(callback).fit(module, loader)
    assert same(dict(module.state_dict()), before)
    assert MaskManager.of(module).masks == {}


def test_a_stream_of_data_asks_for_a_calibration_loader(tiny: Any, loader: DataLoader) -> None:
    refused_fit(tiny, DataLoader(Stream(), batch_size=4), pruner(), "Give `calibration_dataloader`")
    trainer_of(pruner(calibration_dataloader=loader)).fit(tiny, DataLoader(Stream(), batch_size=4))
    assert MaskManager.of(tiny).counts() == (38, 188)


def test_a_training_step_without_a_loss_is_refused(tiny_class: Any, loader: DataLoader) -> None:
    class Silent(tiny_class):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    refused_fit(Silent(), loader, pruner(), "`training_step` must return a scalar loss tensor, got 'NoneType'")


def test_manual_optimization_needs_a_loss_function(tiny_class: Any, loader: DataLoader) -> None:
    class Manual(tiny_class):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(entropy(self, batch))
            optimizer.step()

    refused_fit(Manual(), loader, pruner(), "Give `loss_fn")
    module = Manual()
    trainer_of(pruner(loss_fn=entropy)).fit(module, loader)
    assert MaskManager.of(module).counts() == (38, 188)


def test_a_parameter_held_a_second_time_is_named(tiny_class: Any, loader: DataLoader) -> None:
    class Hoarder(tiny_class):
        def __init__(self) -> None:
            super().__init__()
            self.penalized = [self.hidden.weight]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return entropy(self, batch) + sum(weight.square().sum() for weight in self.penalized)

    refused_fit(Hoarder(), loader, pruner(), "uses the parameter 'hidden.weight' .* attribute 'penalized' holds it")


def test_a_warm_up_from_zero_needs_a_rate(tiny_class: Any, loader: DataLoader) -> None:
    module = tiny_class(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    refused_fit(module, loader, pruner(inner_lr=None), r"which is 0 now \(a warm-up\?\)\. Give a number")
