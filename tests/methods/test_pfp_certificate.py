"""PFP's certificate: what it says, when it holds, when it goes stale; and what PFP refuses."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from integration.toys import QUIET, fit, toy, weights_of
from methods.pfp_oracles import batches, chain, entropy, residual
from torch import Tensor, nn

from lightning_prune import MaskManager, ProvableFilterPruning, Receipt, prune
from lightning_prune.methods.pfp import Certificate, Reader, fingerprint, unit_shares

pytestmark = QUIET
SMALL: dict[str, Any] = {"n_calib": 16, "n_holdout": 16, "measure": False}
STRICT: dict[str, Any] = {"variant": "ht", "ht_sampler": "poisson", "reconstruct": "reweigh"}


def certified(module: nn.Module, **arguments: Any) -> Certificate:
    method = ProvableFilterPruning(**{**SMALL, "budget": 0.5, **arguments})
    prune(module, method, batches(), entropy)
    found = method.certificate
    assert found is not None
    return found


def linear_net(width: int = 400) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 3))


def hidden(module: Any, numbers: slice) -> Tensor:
    with torch.no_grad():
        return module[:3](torch.cat([batch[0] for batch in batches()])[numbers])


# what it says


@pytest.mark.parametrize("variant", ["rand", "ht", "hybrid"])
def test_the_error_on_the_calibration_data_keeps_to_the_bound(variant: str) -> None:
    module: Any = linear_net()
    dense = module[3].weight.detach().clone()
    certificate = certified(module, **{**STRICT, "variant": variant}, budget_type="channels")
    (group,) = certificate.groups
    inputs = hidden(linear_net(), slice(0, 16))
    scaled = module[3].weight.detach()  # 0 where a unit has left
    error = (inputs @ (scaled - dense).T).abs() / (inputs @ dense.abs().T)
    assert group.covered
    assert group.error_exact is not None
    assert 0.05 * group.error_exact < float(error.max()) <= group.error_exact
    assert group.rms_mean is not None
    assert group.rms_max is not None
    assert 0.3 * group.rms_mean < float(error.square().mean().sqrt()) < 3 * group.rms_mean
    assert group.rms_mean <= group.rms_max <= group.error_exact
    if group.error is not None:
        assert group.error_unseen is not None
        assert group.error_exact <= group.error < group.error_unseen


def test_the_largest_error_of_the_top_units_keeps_to_the_dropped_mass() -> None:
    module: Any = linear_net(40)
    dense = module[3].weight.detach().clone()
    (group,) = certified(module, reconstruct="none", budget_type="channels").groups
    inputs = hidden(linear_net(40), slice(0, 16))
    error = (inputs @ (module[3].weight.detach() - dense).T).abs() / (inputs @ dense.abs().T)
    assert group.covered
    assert "nothing was drawn" in group.reason
    assert group.bound == group.dropped_calibration
    assert float(error.max()) <= group.dropped_calibration * (1 + 1e-5) <= group.dropped_sum
    assert not group.vacuous


def test_masses_and_violations_on_hold_out_samples_equal_their_definition() -> None:
    module: Any = linear_net(40)
    reader = Reader.of(module[3], torch.arange(40)[:, None])
    scores = unit_shares(*reader.events(hidden(module, slice(0, 16)))).amax(0)
    fresh = unit_shares(*reader.events(hidden(module, slice(16, 32))))
    (group,) = certified(module, margin=1.0, budget_type="channels").groups
    kept = (module[3].weight != 0).any(0)
    inputs, weight = hidden(linear_net(40), slice(16, 32)), linear_net(40)[3].weight.detach().abs()
    mass = (((inputs * ~kept) @ weight.T) / (inputs @ weight.T)).amax(1)
    assert (group.violations, group.holdout) == (int((fresh > scores * (1 + 1e-6)).any(1).sum()), 16)
    assert group.violations > 0
    assert group.dropped_holdout == pytest.approx(float(mass.max()), rel=1e-5)
    assert group.dropped_holdout_q95 == pytest.approx(float(mass.sort().values[14]), rel=1e-5)
    assert group.sensitivity_sum == pytest.approx(float(scores.sum()), rel=1e-6)
    assert group.dropped_sum == pytest.approx(float(scores[~kept].sum()), rel=1e-5)


def test_samples_events_and_delta_are_counted() -> None:
    certificate = certified(residual(), **STRICT)
    first, second = certificate.groups
    positions = 36
    assert (first.samples, first.holdout) == (16, 16)
    assert first.events == 16 * (6 + 10) * positions  # the stream is read by a convolution and a pointwise one
    assert second.events == 16 * 3
    assert first.delta == second.delta == 0.005
    assert certificate.promised_samples == 57  # ceil(3 ln(8 * 360 * 579 / 0.01)): 216 + 360 + 3 outputs


def test_the_change_end_to_end_is_measured_on_hold_out_samples() -> None:
    module = chain()
    held = batches()[2:4]
    images, classes = (torch.cat(parts) for parts in zip(*held, strict=True))
    before = copy.deepcopy(module).eval()(images).detach()
    found = certified(module).measured
    after = module.eval()(images).detach()
    assert found.samples == 16
    assert found.loss_after == pytest.approx(nn.functional.cross_entropy(after, classes).item(), rel=1e-5)
    assert found.accuracy_before == float((before.argmax(1) == classes).double().mean())
    assert found.agreement == float((before.argmax(1) == after.argmax(1)).double().mean())
    assert found.change_mean == pytest.approx(float((after - before).abs().mean() / before.abs().mean()), rel=1e-5)


def test_a_narrow_drawn_layer_has_a_vacuous_bound_and_says_so() -> None:
    certificate = certified(chain(), variant="rand", reconstruct="reweigh")
    drawn = [group for group in certificate.groups if group.draws]
    assert drawn
    assert all(group.vacuous and group.error is not None and group.error >= 1 for group in drawn)
    assert "yes, vacuous" in str(certificate)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"variant": "ht", "reconstruct": "reweigh"}, "systematic inclusions are correlated"),
        (
            {"variant": "ht", "ht_sampler": "poisson", "reconstruct": "none"},
            "leaves out the scales that the bound needs",
        ),
        ({"reduction": "mean"}, "reduction='mean' measures no largest share"),
    ],
)
def test_what_no_bound_covers_says_why(options: dict[str, Any], reason: str) -> None:
    groups = certified(linear_net(40), **options, budget_type="channels").groups
    assert [group.covered for group in groups] == [False]
    assert reason in groups[0].reason


def test_a_refit_drops_the_bounds_and_keeps_the_masses() -> None:
    module = linear_net(40)
    method = ProvableFilterPruning(0.5, budget_type="channels", variant="rand", n_calib=64, n_holdout=64, measure=False)
    receipt = prune(module, method, batches(60), entropy)
    assert "1 consumers refit" in str(receipt.repair)
    certificate = method.certificate
    assert certificate is not None
    (group,) = certificate.groups
    assert (group.covered, group.error, group.error_exact, group.rms_max) == (False, None, None, None)
    assert group.dropped_calibration > 0
    assert "refit by least squares" in group.reason


def test_outputs_and_readers_that_cannot_be_measured_are_named() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
            self.third, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            out = torch.relu(self.second(torch.relu(self.first(images))))
            return self.head(torch.relu(self.third(out)).mean((2, 3)))

    torch.manual_seed(0)
    certificate = certified(Grouped(), budget=0.8)
    assert certificate.uncovered["head.weight"] == "it is an output of the module"
    text = " ".join(f"{name}: {why}" for name, why in certificate.uncovered.items())
    assert "'second.weight' reads it other than as inputs of a linear layer" in text
    assert all(group.name in ("second", "third") for group in certificate.groups)


def test_a_layer_norm_between_producer_and_reader_is_named() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 12), nn.LayerNorm(12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    certificate = certified(module, budget=0.8)
    assert certificate.uncovered["1.weight"] == "a layer norm takes its mean or scale over all of it"
    assert [group.name for group in certificate.groups] == ["3"]
    assert "1.weight is not covered: a layer norm" in str(certificate)


def test_few_samples_are_no_promise_and_random_positions_a_condition() -> None:
    notes = certified(chain(), max_patches=3).notes
    assert any(note.startswith("16 calibration samples promise nothing about unseen ones") for note in notes)
    assert any("3 random positions per sample" in note for note in notes)


def test_no_hold_out_leaves_the_calibration_part() -> None:
    certificate = certified(chain(), n_holdout=0)
    assert certificate.groups[0].dropped_holdout is None
    assert certificate.groups[0].violations_upper95 is None
    assert certificate.measured.loss_after is None
    assert "No hold-out sample was left" in str(certificate)


def test_three_times_the_sensitivities_bound_trained_units_on_held_out_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(60):
        chosen = torch.arange(64) + 64 * (step % 15)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    method = ProvableFilterPruning(0.5, n_calib=128, n_holdout=512, measure=False)
    prune(net, method, [[images[at : at + 64], labels[at : at + 64]] for at in range(960, 1797, 64)], entropy)
    certificate = method.certificate
    assert certificate is not None
    assert [(group.violations, group.holdout) for group in certificate.groups] == [(0, 512), (0, 512)]
    assert certificate.measured.accuracy_before is not None
    assert certificate.measured.accuracy_before > 0.8


# its life


def test_it_is_a_table_and_plain_json_both_ways() -> None:
    certificate = certified(chain())
    again = Certificate.from_dict(json.loads(json.dumps(certificate.to_dict(), allow_nan=False)))
    assert again == certificate
    text = str(certificate)
    assert "Certificate: asked budget 0.5, budget_type params" in text
    assert all(f"│ {group.name} " in text for group in certificate.groups)
    with pytest.raises(ValueError, match="must hold the fields of a certificate"):
        Certificate.from_dict({"groups": []})


def test_the_receipt_holds_it(tmp_path: Any) -> None:
    module = chain()
    method = ProvableFilterPruning(0.5, **SMALL)
    receipt = prune(module, method, batches(), entropy)
    receipt.save(tmp_path, picture=False)
    certificate = method.certificate
    assert certificate is not None
    assert Receipt.load(tmp_path / "receipt.json").certificate == certificate.to_dict()
    assert any(note.startswith("Certificate: ") for note in receipt.notes)


def test_the_receipt_of_an_epsilon_counts_the_smaller_module() -> None:
    data = list(batches())
    receipt = prune(chain(), ProvableFilterPruning(epsilon=20.0, **SMALL), data, entropy, example_input=data[0][0])
    assert receipt.requested == {"epsilon": 20.0}
    assert receipt.reached["channels"]["pruned"] < receipt.reached["channels"]["dense"]
    assert receipt.reached["flops"]["pruned"] < receipt.reached["flops"]["dense"]


def test_it_goes_stale_as_soon_as_a_weight_moves() -> None:
    module: Any = chain()
    method = ProvableFilterPruning(0.5, **SMALL)
    prune(module, method, batches(), entropy)
    certificate = method.certificate
    assert certificate is not None
    assert certificate.check(module)
    assert not certificate.stale
    MaskManager.of(module).settle()
    assert certificate.check(module)  # writing zeros over zeros moves nothing
    module[9].bias.data[1] += 1e-6
    assert not certificate.check(module)
    later = method.certificate
    assert later is not None
    assert later.stale
    assert "STALE" in str(later)


def test_a_training_step_makes_it_stale_in_the_receipt_and_the_end_of_training_does_not() -> None:
    for at, stale in (("start", True), ("end", False)):
        callback = ProvableFilterPruning(0.5, at=at, n_calib=8, n_holdout=8, measure=False)
        fit(toy(), callback, max_epochs=1)
        assert callback.receipt.certificate["stale"] is stale
        certificate = callback.certificate
        assert certificate is not None
        assert certificate.stale is stale


def test_a_fingerprint_sees_any_weight_and_no_sign_of_zero() -> None:
    module: Any = chain()
    first = fingerprint(module)
    module[4].weight.data[0, 0, 0, 0] = 0.0
    second = fingerprint(module)
    module[4].weight.data[0, 0, 0, 0] = -0.0
    assert first != second == fingerprint(module)
    assert fingerprint(chain()) == first


def test_a_copy_of_a_callback_keeps_its_certificate_and_a_reset_one_has_none() -> None:
    method = ProvableFilterPruning(0.5, **SMALL)
    assert method.certificate is None
    prune(chain(), method, batches(), entropy)
    twin = pickle.loads(pickle.dumps(method))
    assert twin.certificate == method.certificate is not None
    method.reset()
    assert method.certificate is None


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`budget` or `epsilon` must be given, got neither. Give budget=0.5"),
        ({"budget": 0.5, "epsilon": 0.1}, "`budget` and `epsilon` exclude each other, got 0.5 and 0.1"),
        ({"budget": 50}, r"`budget` must be in \(0, 1\], the fraction of the cost that remains, got 50"),
        ({"epsilon": 0.0}, "`epsilon` must be a finite number above 0, got 0.0"),
        ({"budget": 0.5, "delta": 0.0}, r"`delta` must be in \(0, 1\), a probability of failure such as 0.01, got 0.0"),
        ({"budget": 0.5, "delta": 1.0}, r"`delta` must be in \(0, 1\)"),
        ({"budget": 0.5, "margin": 0.5}, "`margin` must be a number >= 1, the K of the paper, got 0.5"),
        ({"budget": 0.5, "variant": "best"}, "`variant` must be one of 'top', 'ht', 'rand', 'hybrid', got 'best'"),
        ({"budget": 0.5, "mode": "signed"}, "`mode` must be one of 'abs', 'split'"),
        ({"budget": 0.5, "reduction": "sum"}, "`reduction` must be one of 'max', 'mean'"),
        (
            {"budget": 0.5, "budget_type": "bytes"},
            "`budget_type` must be one of 'params', 'flops', 'volume', 'channels'",
        ),
        ({"budget": 0.5, "ht_sampler": "pivotal"}, "`ht_sampler` must be one of 'systematic', 'poisson'"),
        ({"budget": 0.5, "reconstruct": True}, "`reconstruct` must be one of 'ls', 'reweigh', 'none'"),
        ({"budget": 0.5, "n_calib": 0}, "`n_calib` must be an integer >= 1, got 0"),
        ({"budget": 0.5, "n_holdout": -1}, "`n_holdout` must be an integer >= 0, got -1"),
        ({"budget": 0.5, "max_patches": 0}, "`max_patches` must be an integer >= 1, got 0"),
        ({"budget": 0.5, "max_elems": 0}, "`max_elems` must be an integer >= 1, got 0"),
        ({"budget": 0.5, "min_keep": 0}, "`min_keep` must be an integer >= 1, got 0"),
        ({"budget": 0.5, "round_to": 0}, "`round_to` must be an integer >= 1, got 0"),
        (
            {"budget": 0.5, "at": [[1, 0.5]]},
            r"must be left out when `at` lists \(when, budget\) pairs, got 0.5 and None",
        ),
        ({"at": [[1, 0.5], [2, 0.7]]}, "`at` must list budgets that do not grow, got 0.5 before 0.7"),
    ],
)
def test_arguments_that_break_their_rule_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProvableFilterPruning(**arguments)


def refused(module: nn.Module, data: Any, message: str, **arguments: Any) -> None:
    before = weights_of(module)
    with pytest.raises(ValueError, match=message):
        prune(module, ProvableFilterPruning(**{"budget": 0.5, **SMALL, **arguments}), data, entropy)
    assert all(torch.equal(before[name], value) for name, value in weights_of(module).items())
    assert MaskManager.of(module).masks == {}


def test_too_few_samples_for_delta_are_refused_with_the_number_needed() -> None:
    message = (
        r"too few calibration samples: `delta`=0.01 promises something from 45, the dataloader has 24\. .* `n_calib`=24"
    )
    refused(chain(), batches(3), message, n_calib=None)


def test_fewer_samples_than_asked_for_are_refused() -> None:
    refused(
        chain(), batches(3), "too few calibration samples: `n_calib` asks for 30, the dataloader has 24", n_calib=30
    )


def test_no_data_is_refused() -> None:
    refused(chain(), [], "there is no calibration batch")


def test_a_dead_layer_is_refused_by_name() -> None:
    module: Any = chain()
    module[7].bias.data.fill_(-100.0)
    refused(module, batches(), "group '7' is dead: none of its 12 units reaches a reader on 16 calibration samples")


def test_a_network_without_channels_that_anything_reads_is_refused() -> None:
    refused(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
        batches(),
        "there is no channel to prune: '1.weight': it is an output",
    )


def test_groups_that_no_measurable_layer_reads_are_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    module[4].weight.requires_grad_(False)
    refused(module, batches(), "no channel group can be measured: '0': '2.weight' reads it other than", exclude=["4"])


def test_a_budget_that_the_floors_exceed_is_refused_with_what_can_be_reached() -> None:
    refused(
        chain(),
        batches(),
        r"`budget` must be at least 0\.\d+ for 'params': with 4 unit\(s\) kept per group",
        budget=0.05,
        min_keep=4,
    )


def test_an_input_that_is_not_finite_is_refused_with_the_layer() -> None:
    data = batches()
    data[1][0][0, 0, 0, 0] = float("nan")
    refused(chain(), data, "input of '4' is not finite on a calibration batch")
