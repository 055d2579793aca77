"""The loss as a pure function: its gradient against plain autograd, no trace of it, clear refusals."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.objective import Objective, buffers_of
from lightning_prune.targets import named_tensors


def fixed_batches(count: int = 3, size: int = 5, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator, dtype=dtype), torch.arange(size) % 3) for _ in range(count)
    ]


def source(batches: list[Any]) -> Any:
    return lambda count: iter(batches[:count])


def plain_gradients(module: LightningModule, batches: list[Any], loss_fn: Any = None) -> dict[str, Tensor]:
    """Autograd on a copy: the mean over batches of the loss, each batch with the buffers as they are now."""
    total: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        twin = copy.deepcopy(module)
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        twin.log = lambda *_, **__: None
        loss = twin.training_step(batch, index) if loss_fn is None else loss_fn(twin, batch)
        loss.backward()
        for name, parameter in named_tensors(twin).items():
            total[name] = total.get(name, 0.0) + parameter.grad / len(batches)
    return total


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-12, atol=1e-14)


# gradients


def test_the_gradient_is_that_of_the_mean_loss_over_batches(tiny):
    tiny.double()
    batches = fixed_batches()
    names = list(named_tensors(tiny))
    expected = plain_gradients(tiny, batches)
    assert_close(Objective(tiny, source(batches)).gradients(names), expected)
    assert_close(Objective(tiny, source(batches), copies=True).gradients(names), expected)
    two = plain_gradients(tiny, batches[:2])
    assert_close(Objective(tiny, source(batches)).gradients(names, count=2), two)


def test_only_the_named_gradients_are_returned_in_their_order(tiny):
    gradients = Objective(tiny, source(fixed_batches(dtype=torch.float32))).gradients(["head.weight", "conv.weight"])
    assert [(name, tuple(value.shape)) for name, value in gradients.items()] == [
        ("head.weight", (3, 8)),
        ("conv.weight", (4, 1, 3, 3)),
    ]


def test_a_loss_function_takes_the_place_of_the_step(tiny):
    tiny.double()

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return module(batch[0]).pow(2).mean()

    batches = fixed_batches()
    expected = plain_gradients(tiny, batches, loss_fn)
    assert_close(Objective(tiny, source(batches), loss_fn).gradients(list(expected)), expected)


def test_a_plain_module_has_a_gradient_by_hand():
    """loss = (2 w x)^2 / 2 with w = 3, x = 1 and 2: dloss/dw = 4 w x^2, mean over batches 30."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 3.0)
    objective = Objective(
        layer, source([torch.tensor([[1.0]]), torch.tensor([[2.0]])]), lambda m, x: (2 * m(x)).pow(2).sum() / 2
    )
    assert objective.gradients(["weight"])["weight"].item() == 30.0


def test_frozen_parameters_are_scored_and_unused_ones_have_gradient_zero(tiny):
    tiny.double()
    tiny.unused = nn.Linear(2, 2).double()
    batches = fixed_batches()

    def touching_all(module: Any, batch: Any) -> Tensor:
        return module.training_step(batch, 0) + 0 * (module.unused.weight.sum() + module.unused.bias.sum())

    expected = plain_gradients(tiny, batches, touching_all)
    tiny.requires_grad_(False)
    assert_close(Objective(tiny, source(batches)).gradients(list(expected)), expected)
    assert not expected["unused.weight"].any()
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


class Tied(LightningModule):
    """One matrix, used as encoder and, transposed, as decoder; and a second name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.decoder(torch.tanh(self.encoder(batch))) - batch).pow(2).mean()}


def test_a_tied_weight_has_the_sum_of_both_gradients():
    module = Tied().double()
    batch = torch.randn(6, 4, dtype=torch.float64)
    module.training_step(batch)["loss"].backward()
    expected = module.encoder.weight.grad
    module.zero_grad()
    gradients = Objective(module, source([batch])).gradients(["encoder.weight"])
    torch.testing.assert_close(gradients["encoder.weight"], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_compiled_module_has_the_same_gradient_under_plain_names(tiny, where):
    tiny.double()
    batches = fixed_batches()
    expected = plain_gradients(tiny, batches)
    if where == "inside":
        tiny.hidden = torch.compile(tiny.hidden, backend="eager")
        module = tiny
    else:
        module = torch.compile(tiny, backend="eager")
    assert_close(Objective(module, source(batches)).gradients(list(expected)), expected)


def test_sixteen_bit_gradients_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16: a sum in the weight's own type would lose every second batch."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    batches = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    gradient = Objective(layer, source(batches), lambda m, x: m(x).sum()).gradients(["weight"])["weight"]
    assert gradient.dtype == torch.float32
    assert gradient.item() == 259.0 / 4


def test_the_reduction_over_ranks_is_applied_once_per_gradient(tiny):
    batches = fixed_batches(dtype=torch.float32)
    plain = Objective(tiny, source(batches)).gradients(["head.weight"])
    doubled = Objective(tiny, source(batches), reduce=lambda tensor: 2 * tensor).gradients(["head.weight"])
    assert torch.equal(doubled["head.weight"], 2 * plain["head.weight"])


def test_progress_is_reported_once_per_batch(tiny):
    calls = []
    Objective(tiny, source(fixed_batches(dtype=torch.float32)), advance=lambda: calls.append(1)).gradients(
        ["conv.weight"]
    )
    assert len(calls) == 3


def test_dropout_is_decided_by_the_seed_alone(tiny_class):
    module = tiny_class(dropout=0.5)
    batches = fixed_batches(dtype=torch.float32)

    def gradient(seed: int) -> Tensor:
        torch.rand(7)  # wherever the global generator stands
        return Objective(module, source(batches), seed=seed).gradients(["head.weight"])["head.weight"]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("failure", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_the_module_and_the_random_states_are_untouched(tiny_class, failure, copies):
    module = tiny_class(dropout=0.5)
    batches = fixed_batches(dtype=torch.float32)
    module.training_step = module.training_step  # an attribute of the instance, as some wrappers set it
    loss = nn.functional.cross_entropy(module(batches[0][0]), batches[0][1])
    loss.backward()
    state = copy.deepcopy(module.state_dict())
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    parameters = dict(module.named_parameters())
    following = next_draws(peek=True)
    if failure:
        batches = [*batches, ("no", "batch")]
        with pytest.raises(TypeError):
            Objective(module, source(batches), copies=copies).gradients(["conv.weight"])
    else:
        Objective(module, source(batches), copies=copies).gradients(["conv.weight"])
    assert next_draws() == following
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameters[name] is p for name, p in module.named_parameters())
    assert all(torch.equal(gradients[name], p.grad) for name, p in module.named_parameters())
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    assert module.training


def next_draws(peek: bool = False) -> tuple[float, float, float]:
    """The next number of each global generator; with `peek` they are drawn again next time."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(1))
    if peek:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    return drawn


def test_buffers_are_copies():
    norm = nn.BatchNorm1d(2)
    buffers_of(norm)["running_mean"].fill_(5.0)
    assert not norm.running_mean.any()


SEEN: list[Any] = []  # outside the module: attributes of it are put back after scoring


class Steps(LightningModule):
    """A training_step with the signature under test."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


class OneArgument(Steps):
    def training_step(self, batch: Tensor) -> Tensor:
        SEEN.append("none")
        return self.layer(batch).sum()


class TwoArguments(Steps):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        SEEN.append(batch_idx)
        return self.layer(batch).sum()


class Starred(Steps):
    def training_step(self, batch: Tensor, *args: Any) -> Tensor:
        SEEN.append(args[0])
        return self.layer(batch).sum()


class Keywords(Steps):
    def training_step(self, batch: Tensor, **kwargs: Any) -> Tensor:
        SEEN.append("none")
        return self.layer(batch).sum()


@pytest.mark.parametrize(
    ("module", "seen"),
    [(OneArgument, ["none"] * 2), (TwoArguments, [0, 1]), (Starred, [0, 1]), (Keywords, ["none"] * 2)],
)
def test_the_batch_index_is_passed_to_steps_that_take_it(module, seen):
    SEEN.clear()
    Objective(module(), source([torch.ones(1, 1)] * 2)).gradients(["layer.weight"])
    assert seen == SEEN


# refusals


def refuses(message: str, batches: Any, loss_fn: Any = lambda m, x: m(x).sum(), module: Any = None) -> None:
    module = nn.Linear(1, 1) if module is None else module
    with pytest.raises(ValueError, match=message):
        Objective(module, source(batches), loss_fn).gradients([next(iter(named_tensors(module)))])


def test_no_batch_is_refused():
    refuses("there is no calibration batch", [])


def test_a_loss_that_is_not_finite_names_the_batch():
    batches = [torch.ones(1, 1), torch.full((1, 1), float("nan"))]
    refuses("the loss of calibration batch 1 is not finite, got nan", batches)


def test_a_gradient_that_is_not_finite_names_parameter_and_batch():
    """The square root of 0 is finite, its slope is not."""
    refuses(
        "the gradient of 'weight' on calibration batch 0 is not finite",
        [torch.ones(1, 1)],
        lambda m, x: (0 * m(x)).abs().sqrt().sum(),
    )


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda loss: None, "'NoneType'"),
        (lambda loss: loss.expand(2), r"a tensor of shape \(2,\)"),
        (lambda loss: 1.0, "'float'"),
        (lambda loss: {"prediction": loss}, "'NoneType'"),
        (lambda loss: (loss,), "'tuple'"),
    ],
)
def test_what_is_no_scalar_loss_is_refused(output, got):
    refuses(
        f"`loss_fn` must return a scalar loss tensor, got {got}", [torch.ones(1, 1)], lambda m, x: output(m(x).sum())
    )


def test_a_step_without_a_loss_is_refused_by_its_name():
    class Skips(Steps):
        def training_step(self, batch: Tensor) -> None:
            return None

    refuses("`training_step` must return a scalar loss tensor, got 'NoneType'", [torch.ones(1, 1)], None, Skips())


def test_a_loss_of_one_element_is_a_scalar():
    layer = nn.Linear(1, 1)
    gradient = Objective(layer, source([torch.ones(1, 1)]), lambda m, x: m(x)).gradients(["weight"])
    assert gradient["weight"].tolist() == [[1.0]]


def test_a_loss_that_depends_on_nothing_is_refused():
    refuses(
        "the loss of calibration batch 0 does not depend on the parameters", [torch.ones(1, 1)], lambda m, x: x.sum()
    )


def test_a_module_without_a_step_needs_a_loss_function():
    with pytest.raises(ValueError, match=r"Linear has no `training_step` .* Give `loss_fn"):
        Objective(nn.Linear(1, 1), source([]))


def test_manual_optimization_needs_a_loss_function():
    module = OneArgument()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="OneArgument optimizes by itself"):
        Objective(module, source([]))
    objective = Objective(module, source([torch.ones(1, 1)]), lambda m, x: m.layer(x).sum())
    assert objective.gradients(["layer.weight"])["layer.weight"].item() == 1.0


def test_a_step_that_reads_the_loader_itself_needs_a_loss_function():
    class Reads(Steps):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return self.layer(next(dataloader_iter)[0]).sum()

    with pytest.raises(ValueError, match="`dataloader_iter` cannot be given single batches"):
        Objective(Reads(), source([]))


def test_a_loss_function_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="`loss_fn` must be callable, got 'mse'"):
        Objective(nn.Linear(1, 1), source([]), "mse")
