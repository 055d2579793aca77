"""Shrunk and masked modules compared, on small networks and under every kind of refusal."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from dependency_nets import NETS, Net, conv, images, pooled, vectors
from torch import Tensor, nn

from lightning_prune._shrink_modules import NarrowMultiheadAttention
from lightning_prune._shrink_probe import mask_units
from lightning_prune.dependency import ChannelGroups, channel_groups
from lightning_prune.masks import MaskManager
from lightning_prune.shrink import CutPlan, removable_units, report_of, shrink

EAGER = [name for name in NETS if name not in ("width_from_input",) and NETS[name][2]]


def random_units(groups: ChannelGroups, seed: int) -> dict[str, Tensor]:
    """Masks that keep at least one unit of each group."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        mask = torch.rand(len(group), generator=generator) < 0.5
        mask[int(torch.randint(len(group), (), generator=generator))] = True
        masks[group.name] = mask
    return masks


def masked_copy(module: nn.Module, groups: ChannelGroups, units: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(module)
    mask_units(twin, list(groups), {name: torch.nonzero(~mask).ravel().tolist() for name, mask in units.items()})
    return twin


def error(first: Tensor, second: Tensor) -> float:
    first, second = first.detach(), second.detach()
    return float((first - second).abs().max() / first.abs().max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["residual", "grouped", "squeeze_excite", "heads", "tied"])
def test_shrunk_equals_masked_in_train_mode_at_other_masks(name, seed):
    factory, example, _ = NETS[name]
    module, inputs = factory(), example()
    groups = channel_groups(module, inputs)
    units = random_units(groups, seed)
    small, reference = shrink(module, inputs, units, groups), masked_copy(module, groups, units)
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    assert error(reference.double().train()(*wide), small.double().train()(*wide)) < 1e-9
    small(*wide).sum().backward()


@pytest.mark.parametrize("name", EAGER)
def test_tensors_hold_exactly_the_kept_positions(name):
    factory, example, _ = NETS[name]
    module, inputs = factory(), example()
    groups = channel_groups(module, inputs)
    units = random_units(groups, seed=3)
    small = dict(shrink(module, inputs, units, groups).named_parameters())
    for parameter_name, parameter in module.named_parameters():
        expected = parameter.detach()
        for dim in range(parameter.dim()):
            gone = [
                group.slices[parameter_name, dim][~units[group.name].numpy()].ravel()
                for group in groups
                if (parameter_name, dim) in group.slices
            ]
            if gone:
                keep = np.setdiff1d(np.arange(parameter.shape[dim]), np.concatenate(gone))
                expected = expected.index_select(dim, torch.as_tensor(keep))
        assert torch.equal(small[parameter_name], expected)


def test_attributes_of_torch_modules_follow():
    factory, example, _ = NETS["group_norm"]
    module, inputs = factory(), example()
    groups = channel_groups(module, inputs)
    small: Any = shrink(module, inputs, {"a": torch.tensor([True, False, True, False])}, groups)
    assert (small.a.out_channels, small.b.in_channels) == (4, 4)
    assert (small.n.num_groups, small.n.num_channels) == (2, 4)


def test_heads_of_a_custom_module_are_edited_and_nothing_else():
    factory, example, _ = NETS["heads"]
    module, inputs = factory(), example()
    module.unrelated, module.width = 4, 16
    small: Any = shrink(module, inputs, {"q": torch.tensor([True, False, False, True])})
    assert (small.num_heads, small.num_key_heads) == (2, 2)
    assert (small.unrelated, small.width) == (4, 16)


def test_torch_attention_gets_narrower_heads_under_the_same_names():
    factory, example, _ = NETS["torch_attention"]
    module, inputs = factory(), example()
    small: Any = shrink(module, inputs, {"m": torch.tensor([True, True, False, True])})
    assert isinstance(small.m, NarrowMultiheadAttention)
    assert small.m.num_heads == 3
    assert list(small.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "padding", "heads"])
def test_narrow_attention_with_all_heads_is_torch_attention(batch_first, kind):
    full = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    narrow = copy.deepcopy(full)
    narrow.__class__ = NarrowMultiheadAttention
    query, key = (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    masks: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": torch.rand(5, 7) < 0.3},
        "float": {"attn_mask": torch.randn(5, 7)},
        "padding": {"key_padding_mask": torch.arange(7).expand(2, 7) > 4},
        "heads": {"attn_mask": torch.randn(8, 5, 7)},
    }[kind]
    for average in (True, False):
        expected = full(query, key, key, average_attn_weights=average, **masks)
        found = narrow(query, key, key, average_attn_weights=average, **masks)
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert narrow(query, key, key, need_weights=False)[1] is None


def test_narrow_attention_takes_a_sequence_without_a_batch():
    full = nn.MultiheadAttention(16, 4).eval()
    narrow = copy.deepcopy(full)
    narrow.__class__ = NarrowMultiheadAttention
    query = torch.randn(5, 16)
    for a, b in zip(full(query, query, query), narrow(query, query, query), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-6)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_original_stays_bit_for_bit():
    factory, example, _ = NETS["residual"]
    module, inputs = factory().train(), example()
    before = snapshot(module)
    shrink(module, inputs, {"a": torch.arange(8) < 3})
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Scaled(nn.Module):
    """A residual branch behind a layer scale of 1e-6: with these parameters a wrong cut could not be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.full((6,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.b(torch.sigmoid(self.a(x)))


def wrong(groups: ChannelGroups) -> ChannelGroups:
    """The first group with the columns of its consumer in another order."""
    group = groups[0]
    slices = {slab: at[::-1].copy() if slab in group.consumers else at for slab, at in group.slices.items()}
    bad = type(group)(group.name, group.units, slices, group.consumers, group.producers)
    return ChannelGroups([bad, *groups[1:]], groups.report, groups.analysis)


def test_a_wrong_cut_is_refused_even_behind_a_tiny_scale():
    module, inputs = Scaled(), vectors()
    groups = wrong(channel_groups(module, inputs))
    before = snapshot(module)
    small = shrink(module, inputs, {"a": torch.arange(8) < 3}, groups)
    assert "differs from the mask" in report_of(small).refused["a"]
    assert report_of(small).params == (116, 116)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_a_right_cut_behind_a_tiny_scale_is_accepted():
    module, inputs = Scaled(), vectors()
    small = shrink(module, inputs, {"a": torch.arange(8) < 3})
    assert report_of(small).units == {"a": (8, 3)}
    assert report_of(small).sensitivity["a"] > 1e-3


class TwoHeads(nn.Module):
    """An auxiliary head that only training runs, normalising over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = conv(3, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        features = pooled(self.a(x))
        return (self.b(features), self.aux(features)) if self.training else self.b(features)


def test_an_analysis_in_eval_mode_alone_fails_the_check_in_train_mode():
    module, inputs = TwoHeads(), images()
    groups = channel_groups(module, inputs, train_mode=False)
    small = shrink(module, inputs, {"a": torch.arange(8) < 4}, groups)
    assert "a" in report_of(small).refused
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in module.parameters())


class FixedBatch(nn.Module):
    """Reshapes by a batch size that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(4, -1))


def test_a_module_of_one_batch_size_is_still_cut():
    small = shrink(FixedBatch(), vectors(), {"a": torch.arange(8) < 4})
    assert report_of(small).units == {"a": (8, 4)}


def test_an_uncuttable_group_does_not_spoil_the_others():
    def run(net: Any, x: Tensor) -> Tensor:
        return net.o(net.a(net.i(x)).relu())

    inner, _, _ = NETS["width_from_input"]
    net = Net(run, i=inner(), a=nn.Linear(16, 8), o=nn.Linear(8, 3))
    inputs = (torch.randn(2, 5, 16),)
    groups = channel_groups(net, inputs)
    units = {group.name: torch.arange(len(group)) < len(group) // 2 for group in groups}
    small = shrink(net, inputs, units, groups, routes=("eager",))
    assert report_of(small).units == {"i.o": (16, 8), "a": (8, 4)}
    assert "invalid for input of size" in report_of(small).refused["i.qkv"]


def test_zero_consumers_are_cut_without_being_named():
    module, inputs = NETS["residual"][0](), images()
    with torch.no_grad():
        module.f.weight[:, [1, 5]] = 0
    small: Any = shrink(module, inputs)
    assert report_of(small).units == {"b": (8, 6)}
    assert error(module(*inputs), small(*inputs)) < 1e-5


def test_masks_decide_where_there_are_any():
    module, inputs = NETS["residual"][0](), images()
    with torch.no_grad():
        module.f.weight[:, 1] = 0
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[:, 5] = False
    MaskManager.of(module).set_masks({"f.weight": mask})
    kept = removable_units(module, channel_groups(module, inputs))
    assert kept["b"].tolist() == [True, False, True, True, True, False, True, True]
    assert kept["a"].all()


def test_a_unit_whose_consumer_is_not_masked_stays_though_its_weights_are_zero():
    module, inputs = NETS["residual"][0](), images()
    with torch.no_grad():
        module.f.weight[:, 1] = 0
    MaskManager.of(module).set_masks({"a.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)})
    assert removable_units(module, channel_groups(module, inputs))["b"].all()


def test_a_group_keeps_one_unit_when_all_are_zero():
    module, inputs = NETS["residual"][0](), images()
    with torch.no_grad():
        module.f.weight.zero_()
        module.f.bias.fill_(1.0)
    assert removable_units(module, channel_groups(module, inputs))["b"].tolist() == [True] + [False] * 7


def test_nothing_masked_gives_a_plain_copy():
    module, inputs = NETS["residual"][0](), images()
    small = shrink(module, inputs)
    assert small is not module
    assert report_of(small).notes == ["No unit was masked, so nothing was cut."]
    assert torch.equal(module(*inputs), small(*inputs))


def test_rounding_keeps_further_masked_units():
    module, inputs = NETS["residual"][0](), images()
    small: Any = shrink(module, inputs, {"a": torch.arange(8) < 3}, round_to=4)
    assert small.a.out_channels == 4
    small = shrink(module, inputs, {"a": torch.arange(8) < 5}, round_to=8)
    assert small.a.out_channels == 8


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01), lambda p: torch.optim.Adam(p, 0.01),
    lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
])  # fmt: skip
def test_next_step_of_the_shrunk_module_is_that_of_the_masked_one(make):
    torch.set_default_dtype(torch.float64)
    try:
        factory, example, _ = NETS["residual"]
        module, inputs = factory(), example()
        groups = channel_groups(module, inputs)
        units = {"a": torch.tensor([True, False, True, True, False, False, True, True])}
        mask_units(module, list(groups), {"a": [1, 4, 5]})
        manager, optimizer = MaskManager.of(module), make(module.parameters())
        columns = units["a"][None, :, None, None].expand(8, 8, 3, 3)
        manager.set_masks({"b.weight": columns, "c.weight": columns})
        for _ in range(3):
            step(module, optimizer, inputs, manager)
        small = copy.deepcopy(module)
        twin = make(small.parameters())
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        plan = report_of(shrink(module, inputs, units, groups)).plan
        plan.apply(small, [twin])
        step(module, optimizer, inputs, manager)
        step(small, twin, inputs)
        for name, parameter in small.named_parameters():
            expected = dict(module.named_parameters())[name].detach()
            expected = plan.narrow(name, expected) if name in plan.kept else expected
            assert torch.allclose(parameter, expected, rtol=1e-12, atol=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)


def step(module: nn.Module, optimizer: Any, inputs: Any, manager: MaskManager | None = None) -> None:
    module.train()
    optimizer.zero_grad()
    (module(*inputs) ** 2).mean().backward()
    if manager is not None:
        manager.mask_gradients()
    optimizer.step()
    if manager is not None:
        manager.apply()


def test_a_plan_replays_from_text_on_a_fresh_module():
    factory, example, _ = NETS["heads"]
    module, inputs = factory(), example()
    small = shrink(module, inputs, {"q": torch.tensor([True, False, True, False])})
    plan = CutPlan.from_json(report_of(small).plan.to_json())
    fresh = plan.apply(factory())
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(*inputs), small(*inputs))
    assert plan == report_of(small).plan


def test_a_plan_of_another_model_changes_nothing():
    plan = report_of(shrink(NETS["residual"][0](), images(), {"a": torch.arange(8) < 3})).plan
    other = NETS["concatenated"][0]()
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"`module` must have 'b.weight' of shape \(8, 8, 3, 3\)|'a.weight' of shape"):
        plan.apply(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 99}'])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"must be a cut plan|has version 99"):
        CutPlan.from_json(text)


@pytest.mark.parametrize(("units", "message"), [
    ({"z": torch.ones(8, dtype=torch.bool)}, "must be one of the groups"),
    ({"a": torch.ones(8)}, r"must be a bool tensor \(True = kept\) of shape \(8,\), got torch.float32"),
    ({"a": torch.ones(7, dtype=torch.bool)}, r"got torch.bool of shape \(7,\)"),
    ({"a": torch.zeros(8, dtype=torch.bool)}, "must keep at least one unit"),
])  # fmt: skip
def test_wrong_units_are_refused(units, message):
    with pytest.raises(ValueError, match=message):
        shrink(NETS["residual"][0](), images(), units)


@pytest.mark.parametrize(("argument", "value"), [("round_to", 0), ("time_limit", 0.0)])
def test_wrong_numbers_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        shrink(NETS["residual"][0](), images(), **{argument: value})


def test_a_plain_module_has_no_report():
    with pytest.raises(ValueError, match="must come from shrink or load_shrunk"):
        report_of(nn.Linear(2, 2))


def test_both_branches_run_after_the_cut():
    module = Branching()
    inputs = (torch.randn(4, 6).abs(),)
    small = shrink(module, inputs, {"a": torch.arange(8) < 3})
    assert report_of(small).units == {"a": (8, 3)}
    reference = masked_copy(module, channel_groups(module, inputs), {"a": torch.arange(8) < 3})
    for sign in (1, -1):
        assert error(reference(sign * inputs[0]), small(sign * inputs[0])) < 1e-5


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).relu())
        return out * 2 if x.sum() > 0 else out


class Caching(nn.Module):
    """Keeps a tensor of its first forward pass, as long as its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        return self.b(self.a(x) + self.cache["bias"])


def test_tensors_cached_by_a_forward_pass_do_not_go_stale():
    module = Caching()
    small = shrink(module, vectors(), {"a": torch.arange(8) < 4})
    assert report_of(small).units == {"a": (8, 4)}
    assert small.cache == {}
    assert small(*vectors()).shape == (4, 3)


def test_time_spent_leaves_the_module_whole():
    small = shrink(NETS["heads"][0](), NETS["heads"][1](), {"q": torch.arange(4) < 2}, time_limit=1e-9)
    assert report_of(small).refused == {"q": "the time limit was spent"} or report_of(small).units == {"q": (4, 2)}
    small(*NETS["heads"][1]())
