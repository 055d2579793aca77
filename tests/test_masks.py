"""MaskManager: committing masks; a refused commit changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from mask_helpers import assert_equal_trees, nothing_kept, random_masks, small_net, snapshot, train
from torch import nn, tensor

from lightning_prune.masks import MaskManager, like


def test_committing_a_mask_zeroes_exactly_the_pruned_weights():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(tensor([[1.0, 2.0], [3.0, 4.0]]))
    bias = layer.bias.detach().clone()
    MaskManager.of(layer).set_masks({"weight": tensor([[True, False], [False, True]])})
    assert layer.weight.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert torch.equal(layer.bias, bias)
    assert MaskManager.of(layer).counts() == (2, 4)
    assert MaskManager.of(layer).sparsity() == 0.5


def test_pruned_weights_are_plus_zero():
    """A product with 0 would leave -0.0 where the weight was negative: equal, but other bytes in a file."""
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, -1.0)
    MaskManager.of(layer).set_masks({"weight": tensor([[True, False]])})
    assert torch.signbit(layer.weight).tolist() == [[True, False]]


def test_settling_turns_minus_zero_into_plus_zero():
    layer = nn.Linear(2, 1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, False]])})
    with torch.no_grad():
        layer.weight.copy_(tensor([[-0.0, -0.0]]))
    manager.settle()
    assert torch.signbit(layer.weight).tolist() == [[True, False]]


def test_parameters_stay_the_same_objects_under_the_same_names():
    net = small_net()
    before = dict(net.named_parameters())
    MaskManager.of(net).set_masks(random_masks(net))
    after = dict(net.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(net.buffers())


def test_one_module_has_one_manager():
    net, other = small_net(), small_net()
    assert MaskManager.of(net) is MaskManager.of(net)
    assert MaskManager.of(net) is not MaskManager.of(other)
    assert MaskManager.of(torch.compile(net, backend="eager")) is MaskManager.of(net)


def test_a_second_mask_is_intersected_with_the_first():
    layer = nn.Linear(4, 1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, True, False, False]])})
    manager.set_masks({"weight": tensor([[True, False, True, False]])})
    assert manager.masks["weight"].tolist() == [[True, False, False, False]]
    assert manager.version == 2


def test_committing_twice_is_committing_once():
    net = small_net()
    masks = random_masks(net)
    MaskManager.of(net).set_masks(masks)
    before = copy.deepcopy((net.state_dict(), MaskManager.of(net).masks))
    MaskManager.of(net).set_masks(masks)
    assert_equal_trees((net.state_dict(), MaskManager.of(net).masks), before)


def test_masks_of_other_tensors_stay_in_force():
    net = small_net()
    masks = random_masks(net)
    manager = MaskManager.of(net)
    manager.set_masks({"0.weight": masks["0.weight"]})
    manager.set_masks({"2.weight": masks["2.weight"]})
    assert_equal_trees(manager.masks, masks)


def test_regrowing_replaces_the_mask_and_starts_at_zero():
    layer = nn.Linear(4, 1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, True, False, False]])})
    kept = layer.weight.detach().clone()
    manager.set_masks({"weight": tensor([[True, False, True, False]])}, regrow=True)
    assert manager.masks["weight"].tolist() == [[True, False, True, False]]
    assert layer.weight.tolist() == [[kept[0, 0].item(), 0.0, 0.0, 0.0]]


def test_new_values_are_written_to_kept_weights_only():
    layer = nn.Linear(2, 2)
    mask = tensor([[True, False], [True, True]])
    MaskManager.of(layer).set_masks({"weight": mask}, {"weight": tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert layer.weight.tolist() == [[1.0, 0.0], [3.0, 4.0]]


def test_clearing_forgets_masks_and_keeps_values():
    net = small_net()
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    before = copy.deepcopy(net.state_dict())
    manager.clear()
    assert manager.masks == {}
    assert manager.sparsity() == 0.0
    assert manager.version == 2
    assert_equal_trees(net.state_dict(), before)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    manager.attach([optimizer])
    train(net, optimizer, 2)
    manager.detach()
    assert (net[0].weight != 0).all()


def test_masks_handed_out_and_taken_in_are_copies():
    layer = nn.Linear(2, 1)
    given = {"weight": tensor([[True, False]])}
    manager = MaskManager.of(layer)
    manager.set_masks(given)
    given["weight"].fill_(True)
    manager.masks["weight"].fill_(True)
    manager.state_dict()["weight"].fill_(True)
    manager.alive({"weight": layer.weight})["weight"].fill_(True)
    assert manager.masks["weight"].tolist() == [[True, False]]


def test_alive_is_the_mask_in_force_or_all_true():
    net = small_net()
    mask = random_masks(net)["0.weight"]
    MaskManager.of(net).set_masks({"0.weight": mask})
    alive = MaskManager.of(net).alive({"0.weight": net[0].weight, "2.weight": net[2].weight})
    assert torch.equal(alive["0.weight"], mask)
    assert alive["2.weight"].all()
    assert alive["2.weight"].shape == (3, 8)


def test_a_tied_tensor_takes_its_mask_under_any_name_and_is_counted_once():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    manager = MaskManager.of(net)
    manager.set_masks({"b.weight": tensor([[True, False], [False, False]])})
    assert list(manager.masks) == ["a.weight"]
    assert manager.counts() == (1, 4)
    assert int((net["b"].weight != 0).sum()) == 1


def test_a_tied_tensor_given_twice_must_agree():
    net = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    net["b"].weight = net["a"].weight
    one, two = tensor([[True, False]]), tensor([[False, True]])
    MaskManager.of(net).set_masks({"a.weight": one, "b.weight": one})
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"names the tied tensor 'a\.weight' twice with different values"):
        MaskManager.of(net).set_masks({"a.weight": one, "b.weight": two})
    assert_equal_trees(snapshot(net), before)


def test_names_of_compiled_modules_are_understood():
    net = small_net()
    net[0] = torch.compile(net[0], backend="eager")
    MaskManager.of(net).set_masks({"0._orig_mod.weight": torch.zeros(8, 6, dtype=torch.bool)})
    assert list(MaskManager.of(net).masks) == ["0.weight"]
    assert not net[0]._orig_mod.weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type_are_zeroed(dtype):
    net = small_net(dtype)
    masks = random_masks(net)
    MaskManager.of(net).set_masks(masks)
    assert torch.equal(net[0].weight != 0, masks["0.weight"])
    assert net[0].weight.dtype == dtype


def test_all_zero_weights_carry_masks():
    layer = nn.Linear(4, 1)
    nn.init.zeros_(layer.weight)
    MaskManager.of(layer).set_masks({"weight": tensor([[True, False, True, False]])})
    assert MaskManager.of(layer).counts() == (2, 4)


def test_a_mask_follows_the_strides_of_a_channels_last_weight():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 3, 3, 3) < 0.5
    MaskManager.of(conv).set_masks({"weight": mask})
    assert torch.equal(conv.weight != 0, mask)
    assert like(mask, conv.weight).stride() == conv.weight.stride()


def test_masks_follow_a_module_that_is_cast_afterwards():
    net = small_net()
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    net.double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    manager.apply()
    assert torch.equal(net[0].weight != 0, manager.masks["0.weight"])


@pytest.mark.parametrize(
    ("masks", "weights", "message"),
    [
        (
            {"0.weight": nothing_kept(), "5.weight": nothing_kept()},
            None,
            r"name '5\.weight' is no parameter of Sequential\. Parameters: 0",
        ),
        (
            {"0.weight": nothing_kept(), "2.weight": nothing_kept()},
            None,
            r"shape \(3, 8\), got \(8, 6\)\. It belongs to another model",
        ),
        ({"0.weight": nothing_kept(), "2.weight": torch.ones(3, 8)}, None, "must be bool .*, got torch.float32"),
        ({"0.weight": nothing_kept(), "2.weight": [True]}, None, "must be a tensor, got list"),
        ({"0.weight": nothing_kept()}, {"2.weight": torch.ones(3, 8)}, r"'2\.weight' comes without a mask"),
        (
            {"0.weight": nothing_kept()},
            {"0.weight": torch.ones(6, 8)},
            r"`weights` entry .* shape \(8, 6\), got \(6, 8\)",
        ),
        ({"0.weight": nothing_kept()}, {"0.weight": torch.full((8, 6), float("nan"))}, "must be finite to be pruned"),
        ({"0.weight": nothing_kept()}, {"0.weight": torch.full((8, 6), 1e300, dtype=torch.float64)}, "must be finite"),
        ({"0.weight": nothing_kept()}, {"1.weight": nothing_kept()}, r"`weights` name '1\.weight' is no parameter"),
    ],
)
def test_a_refused_commit_changes_nothing(masks, weights, message):
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    manager.attach([optimizer])
    train(net, optimizer, 2)
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=message):
        manager.set_masks(masks, weights)
    with pytest.raises(ValueError, match=message):
        manager.set_masks(masks, weights, regrow=True)
    assert_equal_trees(snapshot(net, optimizer), before)
    manager.detach()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    net = small_net()
    with torch.no_grad():
        net[2].weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"the weights of '2\.weight' must be finite to be pruned"):
        MaskManager.of(net).set_masks(random_masks(net))
    with pytest.raises(ValueError, match="must be finite"):
        MaskManager.of(net).load_state_dict(random_masks(net))
    assert MaskManager.of(net).masks == {}
    assert (net[0].weight != 0).all()


def test_a_layer_replaced_after_masking_is_an_error_until_masks_are_cleared():
    net = small_net()
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    net[2] = nn.Linear(8, 4)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has been removed or reshaped since it was masked"):
        manager.set_masks({"0.weight": nothing_kept()})
    with pytest.raises(RuntimeError, match="has been removed or reshaped"):
        manager.attach([])
    assert_equal_trees(snapshot(net), before)
    manager.clear()
    manager.set_masks({"0.weight": nothing_kept()})
    assert manager.counts() == (0, 48)
