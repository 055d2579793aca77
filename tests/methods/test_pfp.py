"""Provable filter pruning end to end: budgets, choices, reweighing, repair, life in a Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from integration.toys import QUIET, fit, leaks, masks_of, toy, toy_loader, toy_loss, weights_of
from methods.pfp_oracles import NETS, batches, chain, concatenated, entropy, residual
from torch import Tensor, nn

from lightning_prune import Magnitude, MaskManager, ProvableFilterPruning, channel_groups, prune, shrink
from lightning_prune.cost import CostModel
from lightning_prune.shrink import removable_units

pytestmark = QUIET
SMALL: dict[str, Any] = {"n_calib": 16, "n_holdout": 16, "measure": False}


def pruned(module: nn.Module, **arguments: Any) -> ProvableFilterPruning:
    method = ProvableFilterPruning(**{**SMALL, **arguments})
    prune(module, method, batches(), entropy)
    return method


def kept_units(module: nn.Module) -> dict[str, Tensor]:
    return removable_units(module, channel_groups(module, batches(1)[0][0]))


def counts(module: nn.Module) -> dict[str, int]:
    return {name: int(kept.sum()) for name, kept in kept_units(module).items()}


# the budget


@pytest.mark.parametrize(("name", "budget"), [("chain", 0.3), ("chain", 0.8), ("residual", 0.5), ("concatenated", 0.5)])
def test_the_smaller_network_has_the_parameters_that_were_predicted(name: str, budget: float) -> None:
    module = NETS[name]()
    dense = sum(p.numel() for p in module.parameters())
    certificate = pruned(module, budget=budget).certificate
    assert certificate is not None
    small = shrink(module, batches(1)[0][0])
    found = sum(p.numel() for p in small.parameters())
    assert certificate.params == {"dense": dense, "pruned": found}
    assert certificate.budget_reached == found / dense <= budget


@pytest.mark.parametrize("kind", ["params", "flops", "volume"])
def test_no_further_unit_fits_into_the_budget(kind: Any) -> None:
    module = chain()
    costs = CostModel(channel_groups(module, batches(1)[0][0]))
    pruned(module, budget=0.5, budget_type=kind)
    limit, found = 0.5 * costs.cost(kind), counts(module)
    assert costs.cost(kind, found) <= limit
    for name, count in found.items():
        if count < costs.dense[[group.name for group in costs.groups].index(name)]:
            assert costs.cost(kind, {**found, name: count + 1}) > limit


def test_half_of_the_units_is_half_of_the_units() -> None:
    module = residual()
    pruned(module, budget=0.5, budget_type="channels")
    assert sum(counts(module).values()) == 8  # of 6 in the residual stream and 10 behind it


def test_kept_units_are_a_multiple_where_that_leaves_any() -> None:
    module = chain()
    pruned(module, budget=0.6, round_to=4)
    assert all(count % 4 == 0 for count in counts(module).values() if count >= 4)


def test_every_group_keeps_the_minimum() -> None:
    module = chain()
    pruned(module, budget=0.3, min_keep=3)
    assert min(counts(module).values()) == 3


def test_an_epsilon_sets_the_budget_and_a_larger_one_a_smaller_one() -> None:
    left = []
    for epsilon in (0.02, 20.0, 200.0):
        certificate = pruned(chain(), epsilon=epsilon).certificate
        assert certificate is not None
        assert certificate.requested == {"epsilon": epsilon}
        left.append(certificate.budget_reached)
    assert left[0] == 1.0 > left[1] > left[2]


# which units


@pytest.mark.parametrize("variant", ["top", "ht", "rand", "hybrid"])
def test_dead_units_always_leave(variant: str) -> None:
    module: Any = chain()
    module[1].weight.data[3], module[1].bias.data[3] = 0.0, -1.0  # behind the ReLU: dead
    module[7].weight.data[:, 18:27] = 0.0  # nothing reads channel 2 of the second convolution
    pruned(module, budget=0.9, variant=variant)
    kept = kept_units(module)
    assert not bool(kept["0"][3])
    assert not bool(kept["4"][2])


@pytest.mark.parametrize("reconstruct", ["ls", "reweigh", "none"])
def test_the_whole_budget_leaves_the_network_bit_for_bit(reconstruct: str) -> None:
    module = chain()
    before = weights_of(module)
    pruned(module, budget=1.0, reconstruct=reconstruct)
    assert all(torch.equal(before[name], value) for name, value in weights_of(module).items())
    assert all(bool(mask.all()) for mask in MaskManager.of(module).masks.values())


def test_the_best_units_of_a_single_group_stay() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3))
    data = batches()
    inputs = torch.cat([batch[0] for batch in data])[:16]
    hidden, weight = module[:3](inputs).detach().double(), module[3].weight.detach().double()
    share = hidden[:, None] * weight.abs() / (hidden @ weight.abs().T)[..., None]
    best = share.amax((0, 1)).sort(descending=True).indices[:4]
    pruned(module, budget=0.4, budget_type="channels")
    assert kept_units(module)["1"].nonzero().ravel().tolist() == sorted(best.tolist())


def test_a_group_takes_the_largest_sensitivity_over_its_readers() -> None:
    module: Any = residual()
    for reader in (module.point, module.conv):
        reader.weight.data[:, 2] *= 0.01  # small in every reader: leaves
    module.point.weight.data[:, 4] *= 0.01  # small in one reader only
    module.conv.weight.data[:, 4] *= 3.0
    pruned(module, budget=0.5, budget_type="channels", reconstruct="none")
    assert not bool(kept_units(module)["stem"][2])
    assert bool(kept_units(module)["stem"][4])


def test_a_seed_settles_the_draw_and_another_one_changes_it() -> None:
    masks = []
    for seed in (0, 0, 1):
        module = chain()
        pruned(module, budget=0.5, variant="ht", seed=seed)
        masks.append(MaskManager.of(module).masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert not all(torch.equal(mask, masks[2][name]) for name, mask in masks[0].items())


def test_split_sensitivities_and_mean_reductions_prune_too() -> None:
    for options in ({"mode": "split", "max_elems": 64}, {"reduction": "mean", "max_patches": 4}):
        certificate = pruned(chain(), budget=0.5, **options).certificate
        assert certificate is not None
        assert 0.4 < certificate.budget_reached <= 0.5


# weights and repair


@pytest.mark.parametrize(("name", "variant"), [("chain", "rand"), ("residual", "ht"), ("concatenated", "hybrid")])
def test_what_is_cut_out_computes_what_the_masked_and_scaled_network_does(name: str, variant: str) -> None:
    module = NETS[name]()
    before = copy.deepcopy(module).eval()
    pruned(module, budget=0.6, variant=variant, reconstruct="reweigh", refit_bn=False)
    images = batches(1, seed=9)[0][0]
    small = shrink(module, images).eval()
    expected = module.eval()(images)
    assert not torch.allclose(expected, before(images), atol=1e-3)
    assert torch.allclose(small(images), expected, atol=1e-6)
    again = NETS[name]().eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(images), expected)


def test_only_readers_are_scaled_and_by_one_factor_per_unit() -> None:
    module: Any = residual()
    before = weights_of(module)
    pruned(module, budget=0.5, budget_type="channels", variant="ht", reconstruct="reweigh", refit_bn=False)
    masks, after = MaskManager.of(module).masks, weights_of(module)
    kept = kept_units(module)["stem"]
    ratio = (after["conv.weight"] / before["conv.weight"])[kept][:, kept]  # its own outputs are the stream too
    factors = ratio.flatten(2)[0, :, 0]
    assert bool((factors >= 1).all())
    assert torch.allclose(ratio, factors.view(1, -1, 1, 1).expand_as(ratio), rtol=1e-5)
    wide = kept_units(module)["point"]
    points = (after["point.weight"] / before["point.weight"])[wide][:, kept]
    assert torch.allclose(points.flatten(1), factors.expand(len(points), -1), rtol=1e-5)
    for name in masks.keys() - {"conv.weight", "point.weight", "head.weight"}:
        assert torch.equal(after[name][masks[name]], before[name][masks[name]])
    assert torch.equal(after["head.bias"], before["head.bias"])


def test_none_leaves_the_kept_weights_as_they_are() -> None:
    module = chain()
    before = weights_of(module)
    pruned(module, budget=0.5, variant="ht", reconstruct="none", refit_bn=False)
    masks = MaskManager.of(module).masks
    assert all(torch.equal(weights_of(module)[name], before[name] * mask) for name, mask in masks.items())


def test_the_refit_keeps_outputs_closer_than_no_refit() -> None:
    errors = {}
    images = batches(1, seed=9)[0][0]
    for reconstruct in ("ls", "none"):
        module = chain()
        dense = copy.deepcopy(module).eval()(images).detach()
        method = ProvableFilterPruning(
            0.6, n_calib=64, n_holdout=0, reconstruct=reconstruct, measure=False, refit_bn=False
        )
        receipt = prune(module, method, batches(40), entropy)
        errors[reconstruct] = float((module.eval()(images).detach() - dense).square().mean())
        assert ("refit by least squares" in str(receipt.repair)) == (reconstruct == "ls")
    assert errors["ls"] < 0.7 * errors["none"]


def test_repairs_do_not_read_hold_out_samples() -> None:
    data, read = batches(6), []

    class Watched:
        def __iter__(self) -> Any:
            read.append([])
            for place, batch in enumerate(data):
                read[-1].append(place)
                yield batch

    seen: list[Tensor] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0])
        return entropy(module, batch)

    module = chain()
    method = ProvableFilterPruning(0.5, n_calib=16, n_holdout=16, measure=False)
    prune(module, method, Watched(), loss)
    held = {data[2][0].data_ptr(), data[3][0].data_ptr()}  # the two batches after the two of the calibration
    places = [image.data_ptr() for image in seen]
    first_held = min(place for place, pointer in enumerate(places) if pointer in held)
    last_held = max(place for place, pointer in enumerate(places) if pointer in held)
    uses = [place for place, pointer in enumerate(places) if pointer in held]
    assert len(uses) == 2 * 3  # before, for the certificate, after
    between = [p for p in range(first_held, last_held) if places[p] == data[5][0].data_ptr()]
    assert between  # the repairs went on to the batches behind


# in a Trainer


def train(callback: ProvableFilterPruning, **settings: Any) -> Any:
    module = toy()
    fit(module, callback, **settings)
    return module


def in_fit(**arguments: Any) -> ProvableFilterPruning:
    return ProvableFilterPruning(**{"n_calib": 8, "n_holdout": 8, "measure": False, **arguments})


@pytest.mark.parametrize(("at", "step"), [("start", 0), (1, 6), (0.5, 6), ("end", 12)])
def test_every_moment_prunes_once_and_the_budget_is_kept(at: Any, step: int) -> None:
    callback = in_fit(budget=0.5, at=at)
    module = train(callback)
    assert [event["step"] for event in callback.history] == [step]
    assert leaks(module) == []
    small = shrink(module, toy_loader().dataset.tensors[0][:2])
    dense = sum(p.numel() for p in module.parameters())
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * dense


def test_rounds_calibrate_anew_and_count_from_the_dense_network() -> None:
    callback = in_fit(at=[["start", 0.8], [1, 0.5], [2, 0.3]])
    module = train(callback, max_epochs=3)
    assert [event["step"] for event in callback.history] == [0, 6, 12]
    assert [event["requested"] for event in callback.history] == [0.8, 0.5, 0.3]
    left = [event["certificate"]["budget_reached"] for event in callback.history]
    assert 0.8 >= left[0] > 0.5 >= left[1] > 0.3 >= left[2] > 0.2
    sums = [[group["sensitivity_sum"] for group in event["certificate"]["groups"]] for event in callback.history]
    assert sums[0] != sums[1] != sums[2]
    assert callback.requested == {"budget": 0.3, "budget_type": "params"}
    assert leaks(module) == []


def test_units_pruned_before_count_as_gone() -> None:
    module = chain()
    prune(module, Magnitude(budget=0.7, budget_type="channels", measure=False), batches(), entropy)
    before = MaskManager.of(module).masks
    pruned(module, budget=0.4, budget_type="channels")
    after = MaskManager.of(module).masks
    assert sum(counts(module).values()) == 10  # of 26
    assert all(bool((before[name] | ~after[name]).all()) for name in before)


def test_a_pruned_network_learns_on() -> None:
    callback = in_fit(budget=0.5)
    module = train(callback, max_epochs=20)
    images, labels = toy_loader().dataset.tensors
    module.eval()
    assert nn.functional.cross_entropy(module(images), labels).item() < 0.3
    assert leaks(module) == []
    assert sum(int(mask.sum()) for mask in masks_of(module).values()) == callback.history[0]["kept"]


def test_a_module_with_tokens_is_pruned_in_its_feed_forward_part() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
            self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images[:, 0])
            tokens = tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))
            return self.head(tokens.mean(1))

    torch.manual_seed(0)
    module = Block()
    method = pruned(module, budget=0.6)
    assert 1 <= counts(module)["up"] < 24
    certificate = method.certificate
    assert certificate is not None
    assert "a layer norm takes its mean" in certificate.uncovered["embed.weight"]
    assert [group.name for group in certificate.groups] == ["up"]


def test_the_same_masks_come_from_a_loss_in_the_module() -> None:
    one, two = toy(), toy()
    prune(one, in_fit(budget=0.5), toy_loader(), toy_loss)
    prune(two, in_fit(budget=0.5), toy_loader())
    assert all(torch.equal(mask, masks_of(two)[name]) for name, mask in masks_of(one).items())


def test_concatenated_groups_share_their_reader() -> None:
    module = concatenated()
    certificate = pruned(module, budget=0.5, variant="ht", ht_sampler="poisson", reconstruct="reweigh").certificate
    assert certificate is not None
    assert [group.name for group in certificate.groups] == ["left", "right", "join"]
    assert all(group.sensitivity_sum <= group.units for group in certificate.groups)
