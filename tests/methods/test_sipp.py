"""SiPP: shares of single weights, the allocation over rows, and the three variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration.toys import QUIET, fit, leaks, masks_of, toy, toy_loader, toy_loss, weights_of
from methods.pfp_oracles import batches, chain, entropy, residual
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import MaskManager, SiPP, prune
from lightning_prune.methods._pfp_kernel import Reader
from lightning_prune.methods._pfp_sampling import inclusion_probabilities
from lightning_prune.methods._sipp_scores import equal_input_shares, layers_of, sensitivities
from lightning_prune.methods.sipp import Rows, choose_rows, row_error, water_filling, weight_shares, whole_numbers
from lightning_prune.objective import Objective

pytestmark = QUIET
NOTHING = torch.zeros(0, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(layer: nn.Module, inputs: Tensor, reduction: str = "mean", **options: Any) -> Tensor:
    return weight_shares(*Reader.of(layer, NOTHING).events(inputs), reduction, **options).view(layer.weight.shape)


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), dtype=torch.float64)
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    return layer


def naive(layer: Any, inputs: Tensor, reduction: str) -> Tensor:
    """Loop over outputs and weights of a convolution or linear layer of one group, sign by sign."""
    if isinstance(layer, nn.Linear):
        patches = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    else:
        padded = functional.pad(inputs, layer._reversed_padding_repeated_twice)
        patches = functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    weight = layer.weight.detach().flatten(1)
    found = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        terms = patches * row
        for part in (patches > 0, patches < 0):
            for own in (row > 0, row < 0):
                mine = torch.where(part & own, terms, 0.0).abs()
                whole = mine.sum(2, keepdim=True)
                ratio = torch.where(whole > 0, mine / whole, 0.0)
                best = (ratio.mean(1) if reduction == "mean" else ratio.amax(1)).amax(0)
                found[i] = torch.maximum(found[i], best)
    return found.view(layer.weight.shape)


# shares


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_one_row_on_equal_inputs(reduction: str) -> None:
    score = shares(linear([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.float64), reduction)
    assert score[0].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], rel=1e-12)


def test_signs_are_compared_apart() -> None:
    score = shares(linear([[1, -2, 3]]), torch.ones(1, 3, dtype=torch.float64))
    assert score[0].tolist() == pytest.approx([1 / 4, 1, 3 / 4], rel=1e-12)


def test_the_largest_sample_counts_and_the_mean_position() -> None:
    layer, inputs = linear([[1, 1]]), torch.tensor([[[1.0, 1.0], [3.0, 1.0]], [[1.0, 4.0], [1.0, 1.0]]]).double()
    assert shares(layer, inputs, "mean")[0].tolist() == pytest.approx([0.625, 0.65], rel=1e-12)
    assert shares(layer, inputs, "max")[0].tolist() == pytest.approx([0.75, 0.8], rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 2}])
def test_shares_equal_a_loop_over_rows(options: dict[str, Any], signed: bool, reduction: str) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Conv2d(3, 4, 3, dtype=torch.float64, **options), torch.randn(3, 3, 7, 6, dtype=torch.float64)
    inputs = inputs if signed else inputs.relu()
    found = shares(layer, inputs, reduction)
    assert torch.allclose(found, naive(layer, inputs, reduction), rtol=0, atol=1e-12)
    assert torch.allclose(shares(layer, inputs, reduction, max_elements=200), found, rtol=0, atol=1e-14)


def measured(module: nn.Module, data: Any, reduction: str = "mean", **options: Any) -> dict[str, Tensor]:
    names = [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
    objective = Objective(module, lambda count: data[:count], entropy)
    return sensitivities(objective, layers_of(module, names), data, reduction, **options)[0]


def test_batches_one_after_the_other_give_what_one_batch_gives() -> None:
    module, data = chain(), batches(3)
    whole = [[torch.cat(parts) for parts in zip(*data, strict=True)]]
    one, two = measured(module, data, max_elements=500), measured(module, whole)
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)


def test_every_group_of_a_convolution_is_a_layer_of_its_own() -> None:
    module, data = residual().eval(), batches(2)
    score = measured(module, data)["depth.weight"]
    with torch.no_grad():
        stream = torch.relu(module.stem_norm(module.stem(torch.cat([batch[0] for batch in data]))))  # type: ignore
        stream = torch.relu(stream + module.norm(module.conv(stream)))  # type: ignore
        wide = torch.relu(module.point_norm(module.point(stream)))  # type: ignore
    single = nn.Conv2d(1, 1, 3)
    single.weight.data = module.depth.weight.data[4:5]  # type: ignore
    assert torch.allclose(score[4:5], shares(single, wide[:, 4:5]), rtol=0, atol=1e-5)


def test_random_positions_are_a_part_of_all() -> None:
    module, data = chain(), batches(2)
    some, every = measured(module, data, "max", max_patches=3), measured(module, data, "max")
    assert all(bool((some[name] <= every[name] + 1e-6).all()) for name in some)
    assert not torch.allclose(some["4.weight"], every["4.weight"])


# the allocation


def rows(count: int = 30) -> Rows:
    source = generator(5)
    alpha = 20 * torch.rand(count, generator=source, dtype=torch.float64) + 1
    limits = torch.randint(2, 40, (count,), generator=source).double()
    return Rows(alpha, limits, torch.rand(count, generator=source, dtype=torch.float64) + 0.1)


def total_error(given: Rows, amounts: Tensor) -> Tensor:
    return (given.costs * row_error(given.alpha, amounts)).sum(-1)


def test_the_error_of_a_row_is_the_formula() -> None:
    found = row_error(torch.tensor([6.0]).double(), torch.tensor([2.0]))  # u = 1
    assert float(found) == pytest.approx((1 + 13**0.5) / 2, rel=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_water_filling_spends_the_budget_within_the_limits(share: float) -> None:
    given = rows()
    budget = share * float(given.limits.sum())
    found = water_filling(given, budget)
    assert float(found.sum()) == pytest.approx(budget, rel=1e-9)
    assert bool((found > 0).all() & (found <= given.limits).all())


def test_water_filling_gives_every_open_row_the_same_price() -> None:
    given = rows()
    found = water_filling(given, 0.4 * float(given.limits.sum())).requires_grad_()
    total_error(given, found).backward()
    price, full = -found.grad, found.detach() >= given.limits * (1 - 1e-9)  # type: ignore[operator]
    assert float(price[~full].std() / price[~full].mean()) < 1e-6
    assert not bool(full.any()) or float(price[full].min()) >= float(price[~full].mean()) * (1 - 1e-6)


def test_no_move_between_two_rows_improves_the_allocation() -> None:
    given, source = rows(), generator(1)
    found = water_filling(given, 0.4 * float(given.limits.sum()))
    best = float(total_error(given, found))
    pairs = torch.randint(0, len(found), (20000, 2), generator=source)
    step = 10 ** (4 * torch.rand(20000, generator=source, dtype=torch.float64) - 4)
    tried = found.expand(20000, -1).clone()
    tried.scatter_add_(1, pairs[:, :1], step[:, None])
    tried.scatter_add_(1, pairs[:, 1:], -step[:, None])
    allowed = (tried > 1e-6).all(1) & (tried <= given.limits).all(1)
    assert int(allowed.sum()) > 1000
    assert float(total_error(given, tried[allowed]).min()) >= best * (1 - 1e-9)


def test_a_budget_beyond_the_limits_keeps_everything() -> None:
    given = rows()
    assert torch.equal(water_filling(given, 1e6), given.limits)


@pytest.mark.parametrize("total", [0, 1, 7, 9, 10])
def test_whole_numbers_have_the_sum_and_stay_within_the_limits(total: int) -> None:
    amounts, limits = torch.tensor([0.4, 2.6, 3.5, 0.5]), torch.tensor([1.0, 3.0, 5.0, 1.0])
    counts = whole_numbers(amounts, limits, total)
    assert int(counts.sum()) == total
    assert bool((counts >= 0).all() & (counts <= limits).all())
    assert total != 7 or counts.tolist() == [0, 3, 3, 1] or counts.tolist() == [0, 3, 4, 0]


# the choice inside rows


SCORES = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.7, 0.2, 0.1], dtype=torch.float64)
ROWS = torch.tensor([0, 0, 0, 0, 1, 1, 1])


def test_rows_keep_exactly_their_counts_and_scales_have_mean_one() -> None:
    source = generator()
    found = torch.stack([choose_rows(SCORES, ROWS, torch.tensor([2, 1]), None, source) for _ in range(500)])
    assert set((found[:, :4] > 0).sum(1).tolist()) == {2}
    assert set((found[:, 4:] > 0).sum(1).tolist()) == {1}
    assert not bool(found[:, 3].any())
    living = SCORES > 0
    error = (found.mean(0) - 1).abs()[living]
    assert bool((error <= 4.5 * found.std(0)[living] / 500**0.5 + 1e-12).all())


def test_a_row_that_keeps_all_its_living_weights_is_not_scaled() -> None:
    assert choose_rows(SCORES, ROWS, torch.tensor([3, 0]), None, generator()).tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_hybrid_keeps_the_largest_where_that_has_the_smaller_bound() -> None:
    # row 0 drops 0.2, row 1 drops 0.3: bounds 0.6 and 0.9
    found = choose_rows(SCORES, ROWS, torch.tensor([2, 1]), torch.tensor([0.6 + 1e-9, 0.8]), generator())
    assert found[:4].tolist() == [1, 1, 0, 0]
    assert int((found[4:] > 0).sum()) == 1
    assert float(found[4:].max()) > 1


# the callback


@pytest.mark.parametrize("variant", ["deterministic", "sampled", "hybrid"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
def test_the_kept_count_is_exact(variant: str, sparsity: float) -> None:
    module = toy()
    receipt = prune(module, SiPP(sparsity, variant=variant, n_calib=16, measure=False), toy_loader(), toy_loss)
    assert receipt.reached["kept"] == 840 - int(sparsity * 840 + 1e-9)
    assert leaks(module) == []


def test_the_deterministic_variant_keeps_the_largest_shares_of_the_network() -> None:
    module, data = chain(), batches()
    scores = measured(chain(), data[:4])
    prune(module, SiPP(0.8, n_calib=32, measure=False), data, entropy)
    masks = MaskManager.of(module).masks
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert float(kept.min()) >= float(gone.max())


def test_the_deterministic_variant_changes_no_value() -> None:
    module = chain()
    before = weights_of(module)
    prune(module, SiPP(0.7, n_calib=32, measure=False), batches(), entropy)
    masks = MaskManager.of(module).masks
    assert all(torch.equal(weights_of(module)[name], before[name] * mask) for name, mask in masks.items())


def test_sampled_weights_are_scaled_by_one_over_their_probability() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    net.load_state_dict(dense.state_dict())
    data = batches(2)
    prune(net, SiPP(0.4, variant="sampled", n_calib=16, measure=False), data, entropy)
    scores = measured(dense, data, "max")["1.weight"]
    scale = (net[1].weight / dense[1].weight).detach()
    for i, sign in ((i, sign) for i in range(3) for sign in (1, -1)):
        row = scores[i][sign * dense[1].weight[i].detach() > 0].double()
        factors = scale[i][sign * dense[1].weight[i].detach() > 0].double()
        count = int((factors > 0).sum())
        odds = inclusion_probabilities(row, count)
        assert torch.allclose(factors, torch.where(factors > 0, 1 / odds, 0.0), rtol=1e-4)
        assert count < len(row)


def test_a_seed_settles_the_draw_and_another_one_changes_it() -> None:
    masks = []
    for seed in (0, 0, 1):
        module = chain()
        prune(module, SiPP(0.7, variant="sampled", n_calib=16, seed=seed, measure=False), batches(), entropy)
        masks.append(MaskManager.of(module).masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert not all(torch.equal(mask, masks[2][name]) for name, mask in masks[0].items())


def test_weights_pruned_before_count_as_gone() -> None:
    for variant in ("deterministic", "sampled"):
        module = chain()
        prune(module, SiPP(0.5, n_calib=16, measure=False), batches(), entropy)
        before = MaskManager.of(module).masks
        prune(module, SiPP(0.8, variant=variant, n_calib=16, measure=False), batches(), entropy)
        after = MaskManager.of(module).masks
        assert all(bool((before[name] | ~after[name]).all()) for name in before)
        total = sum(mask.numel() for mask in after.values())
        assert sum(int(mask.sum()) for mask in after.values()) == total - int(0.8 * total + 1e-9)


def test_a_fit_prunes_in_rounds_and_goes_on() -> None:
    module, callback = toy(), SiPP(at=[[1, 0.5], [2, 0.8]], variant="hybrid", n_calib=8, measure=False)
    fit(module, callback, max_epochs=3)
    assert [event["step"] for event in callback.history] == [6, 12]
    assert sum(int(mask.sum()) for mask in masks_of(module).values()) == 840 - 672
    assert leaks(module) == []


def test_a_layer_that_cannot_be_seen_at_work_takes_equal_inputs() -> None:
    module: Any = chain()
    module.spare = nn.Linear(4, 2)
    module.spare.weight.data = torch.tensor([[1.0, 3.0, -2.0, 0.0], [0.0, 0.0, -1.0, -1.0]])
    module.forward = lambda images: nn.Sequential(*list(module)[:-1])(images)
    assert equal_input_shares(module.spare.weight).tolist() == [[0.25, 0.75, 1.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    receipt = prune(module, SiPP(0.9, n_calib=16, measure=False), batches(), entropy)
    assert "spare.weight cannot be seen at work: its shares are those of equal inputs." in receipt.notes
    assert MaskManager.of(module).masks["spare.weight"].tolist()[0] == [True, True, True, False]
    deconvolution = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(128, 3))
    receipt = prune(deconvolution, SiPP(0.5, variant="sampled", n_calib=16, measure=False), batches(), entropy)
    assert any(note.startswith("0.weight cannot be seen") for note in receipt.notes)


def test_fewer_samples_than_asked_for_are_noted() -> None:
    receipt = prune(chain(), SiPP(0.5, n_calib=100, measure=False), batches(2), entropy)
    assert "Shares measured on 16 of the 100 samples asked for." in receipt.notes


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "variant": "random"}, "`variant` must be one of 'deterministic', 'sampled', 'hybrid'"),
        (
            {"sparsity": 0.5, "delta": 1.0},
            r"`delta` must be in \(0, 1\), a probability of failure such as 0.01, got 1.0",
        ),
        ({"sparsity": 0.5, "n_calib": 0}, "`n_calib` must be an integer >= 1, got 0"),
        ({"sparsity": 0.5, "max_patches": 0}, "`max_patches` must be an integer >= 1, got 0"),
        ({"sparsity": 0.5, "max_elems": 0}, "`max_elems` must be an integer >= 1, got 0"),
        ({"sparsity": 90}, r"`sparsity` must be in \[0, 1\), got 90"),
    ],
)
def test_arguments_that_break_their_rule_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiPP(**arguments)


def refused(module: nn.Module, data: Any, message: str) -> None:
    before = weights_of(module)
    with pytest.raises(ValueError, match=message):
        prune(module, SiPP(0.5, n_calib=16, measure=False), data, entropy)
    assert all(torch.equal(before[name], value) for name, value in weights_of(module).items())
    assert MaskManager.of(module).masks == {}


def test_no_data_is_refused() -> None:
    refused(chain(), [], "there is no calibration batch")


def test_values_that_are_not_finite_are_refused_with_the_layer() -> None:
    data = batches()
    data[0][0][0, 0, 0, 0] = float("inf")
    refused(chain(), data, "input of '0.weight' is not finite on a calibration batch")
