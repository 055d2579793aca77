"""MaskManager: pruned weights are exactly 0 after every step of every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mask_helpers import assert_equal_trees, pruned_values, random_masks, small_net, train
from torch import Tensor, nn, tensor

from lightning_prune.masks import DTensor, MaskManager, full, local
from lightning_prune.targets import named_tensors

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.01),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.01)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=0.05, weight_decay=0.01)
LBFGS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, history_size=5),
    "lbfgs_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, history_size=5, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LBFGS])
def test_pruned_weights_are_exactly_zero_after_every_step(name):
    net = small_net()
    optimizer = {**OPTIMIZERS, **LBFGS}[name](list(net.parameters()))
    manager = MaskManager.of(net)
    manager.attach([optimizer])
    train(net, optimizer, 5)
    manager.set_masks(random_masks(net))
    checked = []

    def watch() -> None:
        checked.append(bool((pruned_values(net) == 0).all()))

    losses = train(net, optimizer, 10, watch)
    manager.detach()
    assert checked == [True] * 10
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_pruned_weights_is_zero_and_stays_zero(name):
    net = small_net()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    manager = MaskManager.of(net)
    manager.attach([optimizer])
    train(net, optimizer, 3)
    kept_before = copy.deepcopy(list(optimizer.state.values()))
    masks = random_masks(net)
    manager.set_masks(masks)
    shaped = 0
    for parameter_name, mask in masks.items():
        state = optimizer.state.get(named_tensors(net)[parameter_name], {})
        shaped += sum(isinstance(value, Tensor) and value.shape == mask.shape for value in state.values())
    assert shaped or name in ("sgd", "adafactor")

    def assert_zero() -> None:
        for parameter_name, mask in masks.items():
            state = optimizer.state.get(named_tensors(net)[parameter_name], {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert not value[~mask].any()

    assert_zero()
    for before, after in zip(kept_before, optimizer.state.values(), strict=True):
        for key, value in after.items():
            same = not isinstance(value, Tensor) or bool(((value == before[key]) | (value == 0)).all())
            assert same, f"{key} of kept weights changed"
    train(net, optimizer, 3, assert_zero)
    manager.detach()


@pytest.mark.parametrize("name", LBFGS)
def test_lbfgs_forgets_the_pruned_part_of_its_directions(name):
    net = small_net()
    optimizer = LBFGS[name](list(net.parameters()))
    manager = MaskManager.of(net)
    manager.attach([optimizer])
    train(net, optimizer, 3)
    manager.set_masks(random_masks(net))
    alive = manager.alive(dict(net.named_parameters()))
    dead = ~torch.cat([mask.flatten() for mask in alive.values()])
    (state,) = optimizer.state.values()
    flat = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
    assert len(flat) > 2
    for value in flat:
        assert not value[dead].any()
        assert value[~dead].any()
    losses = train(net, optimizer, 5)
    manager.detach()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop", "adagrad"])
def test_kept_weights_move_as_without_masked_gradients(name):
    """Elementwise optimizers: what is masked elsewhere does not reach a kept weight."""
    ends = []
    for masked in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(6, 3)
        optimizer = OPTIMIZERS[name](list(layer.parameters()))
        manager = MaskManager.of(layer)
        manager.set_masks({"weight": torch.arange(18).view(3, 6) % 2 == 0})
        manager.attach([optimizer])
        inputs = torch.randn(8, 6)
        for _ in range(4):
            optimizer.zero_grad()
            layer(inputs).pow(2).mean().backward()
            if masked:
                manager.mask_gradients(optimizer)
            optimizer.step()
        manager.detach()
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_without_the_hook_momentum_brings_pruned_weights_back():
    """The control of the tests above: they can fail."""
    net = small_net()
    optimizer = OPTIMIZERS["momentum"](list(net.parameters()))
    train(net, optimizer, 3)
    MaskManager.of(net).set_masks(random_masks(net))
    train(net, optimizer, 1)
    assert (pruned_values(net) != 0).any()


def test_masked_gradients_are_zero_and_missing_ones_are_passed_over():
    net = small_net()
    manager = MaskManager.of(net)
    masks = random_masks(net)
    manager.set_masks(masks)
    manager.mask_gradients()
    net(torch.randn(4, 6)).sum().backward()
    net[2].weight.grad = None
    manager.mask_gradients()
    assert torch.equal(net[0].weight.grad != 0, masks["0.weight"] & (net[0].weight.grad != 0))
    assert not net[0].weight.grad[~masks["0.weight"]].any()
    assert net[2].weight.grad is None


def test_sparse_gradients_are_masked():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    manager = MaskManager.of(embedding)
    mask = torch.arange(15).view(5, 3) % 2 == 0
    manager.set_masks({"weight": mask})
    manager.attach([optimizer])
    embedding(tensor([0, 2, 2])).sum().backward()
    manager.mask_gradients(optimizer)
    assert not embedding.weight.grad.to_dense()[~mask].any()
    optimizer.step()
    manager.detach()
    assert not embedding.weight[~mask].any()


def test_an_infinite_second_moment_of_a_pruned_weight_does_no_harm():
    """0 * inf is NaN: a product would poison the weight at the next step."""
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    manager = MaskManager.of(layer)
    manager.attach([optimizer])
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[layer.weight]["exp_avg_sq"].fill_(float("inf"))
    manager.set_masks({"weight": tensor([[True, False]])})
    optimizer.step()
    manager.detach()
    assert torch.isfinite(layer.weight).all()
    assert layer.weight[0, 1] == 0


def test_integer_state_of_the_same_shape_is_left_alone():
    """Eight bit moments have no zero at code 0."""
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state[layer.weight]["codes"] = torch.full((1, 2), 127, dtype=torch.uint8)
    manager = MaskManager.of(layer)
    manager.attach([optimizer])
    manager.set_masks({"weight": tensor([[True, False]])})
    manager.detach()
    assert optimizer.state[layer.weight]["codes"].tolist() == [[127, 127]]


def test_several_optimizers_each_enforce_what_they_update():
    net = small_net()
    first = torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(net[2].parameters(), lr=0.1)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    manager.attach([first, second])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.ones_like(parameter)
    first.step()
    assert not net[0].weight[~manager.masks["0.weight"]].any()
    assert net[2].weight[~manager.masks["2.weight"]].all()
    second.step()
    manager.detach()
    assert (pruned_values(net) == 0).all()


def test_layers_unfrozen_later_are_enforced_too():
    """A finetuning callback adds parameter groups in the middle of a fit."""
    net = small_net()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1, momentum=0.9)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    manager.attach([optimizer])
    train(net, optimizer, 1)
    optimizer.add_param_group({"params": list(net[0].parameters()), "weight_decay": 0.1})
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    train(net, optimizer, 1)
    manager.detach()
    assert (pruned_values(net) == 0).all()


def hook_counts(*optimizers: torch.optim.Optimizer) -> list[int]:
    return [len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers]


def test_attaching_again_leaves_one_hook_per_optimizer_and_detaching_none():
    net = small_net()
    one, two = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters())
    manager = MaskManager.of(net)
    manager.attach([one, two])
    manager.attach([one, two, one])
    assert hook_counts(one, two) == [1, 1]
    manager.attach([two])
    assert hook_counts(one, two) == [0, 1]
    manager.detach()
    manager.detach()
    assert hook_counts(one, two) == [0, 0]


def test_attaching_masks_weights_and_state_that_a_restore_brought_back():
    net = small_net()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    train(net, optimizer, 2)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    manager.attach([optimizer])
    manager.detach()
    assert (pruned_values(net) == 0).all()
    assert not optimizer.state[net[0].weight]["exp_avg"][~manager.masks["0.weight"]].any()


def test_attaching_without_masking_state_leaves_it_as_it_was_saved():
    net = small_net()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    train(net, optimizer, 2)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    before = copy.deepcopy(list(optimizer.state.values()))
    manager.attach([optimizer], mask_state=False)
    manager.detach()
    assert_equal_trees(list(optimizer.state.values()), before)


def test_projections_run_in_order_before_the_masks_and_survive_a_second_attach():
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, False]])})
    seen = []

    def fill(_: torch.optim.Optimizer) -> None:
        seen.append("fill")
        with torch.no_grad():
            layer.weight.fill_(3.0)

    manager.projections.append(fill)
    manager.projections.append(lambda stepped: seen.append(stepped is optimizer))
    manager.attach([optimizer])  # a second callback binds
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert seen == ["fill", True]
    assert layer.weight.tolist() == [[3.0, 0.0]]
    manager.detach()
    optimizer.step()
    assert seen == ["fill", True]
    assert manager.projections == []


def test_averaged_copies_carry_the_same_zeros():
    net = small_net()
    average = torch.optim.swa_utils.AveragedModel(net)
    manager = MaskManager.of(net)
    manager.shadows = lambda: [average.module]
    manager.attach([])
    assert list(manager.shadows()) == [average.module]
    masks = random_masks(net)
    manager.set_masks(masks)
    for name, mask in masks.items():
        assert torch.equal(named_tensors(average.module)[name] != 0, mask)
    manager.detach()
    assert list(manager.shadows()) == []


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_parameters_are_masked(mesh):
    from torch.distributed.fsdp import fully_shard

    net = small_net()
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert isinstance(net[0].weight, DTensor)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    manager = MaskManager.of(net)
    manager.attach([optimizer])
    train(net, optimizer, 2)
    masks = random_masks(net)
    manager.set_masks(masks, {"2.weight": torch.full((3, 8), 2.0)})
    assert torch.equal(full(net[0].weight.detach()) != 0, masks["0.weight"])
    assert torch.equal(full(net[2].weight.detach()), 2.0 * masks["2.weight"])
    assert not local(optimizer.state[net[0].weight]["exp_avg"])[~masks["0.weight"]].any()
    train(net, optimizer, 3)
    manager.detach()
    assert (pruned_values(net) == 0).all()
    assert manager.state_dict()["0.weight"].dtype == torch.bool
    assert torch.equal(manager.alive({"0.weight": net[0].weight})["0.weight"], masks["0.weight"])
