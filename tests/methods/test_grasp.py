"""GraSP against quadratics whose Hessian is known, its sign, its temperature, its balanced batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import GraSP, MaskManager, prune
from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods._prospr_batches import BatchStream
from lightning_prune.methods.grasp import balanced_batch, grasp_scores
from lightning_prune.objective import Objective


def quadratic(count: int = 1) -> tuple[Losses, list[Tensor], list[Tensor], Tensor]:
    """L_t(w) = 1/2 w'A_t w - b_t'w, its matrices and vectors, and w; float64."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(count, 6, 6, generator=generator, dtype=torch.float64)
    matrices = [half @ half.T for half in halves]
    vectors = list(torch.randn(count, 6, generator=generator, dtype=torch.float64))
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    losses = Losses(lambda t: [lambda theta: 0.5 * theta["w"] @ matrices[t] @ theta["w"] - vectors[t] @ theta["w"]])
    return losses, matrices, vectors, weight


def test_the_score_on_a_quadratic_is_w_times_hessian_times_gradient() -> None:
    losses, (matrix,), (vector,), weight = quadratic()
    expected = weight * (matrix @ (matrix @ weight - vector))
    assert torch.allclose(grasp_scores(losses, {"w": weight})["w"], expected, rtol=1e-13)


def test_several_batches_are_those_of_the_mean_loss() -> None:
    losses, matrices, vectors, weight = quadratic(3)
    matrix, vector = sum(matrices) / 3, sum(vectors) / 3
    expected = weight * (matrix @ (matrix @ weight - vector))
    assert torch.allclose(grasp_scores(losses, {"w": weight}, count=3)["w"], expected, rtol=1e-12)


def test_the_score_is_the_change_of_half_the_squared_gradient_norm_by_a_multiplier() -> None:
    objective = Objective(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        lambda count: [torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)],
        loss_fn=lambda module, batch: module(batch).square().mean(),
    )
    with replayed_losses(objective, seed=0, second_order=True) as losses:
        path, start = losses(objective.batches(1)), point_of(objective.module)
        weights = {name: start[name] for name in ("0.weight", "2.weight")}
        scores = grasp_scores(path, weights)["0.weight"]

        def flow(multiplier: float) -> float:
            moved = {name: value.clone() for name, value in weights.items()}
            moved["0.weight"][1, 2] *= multiplier
            return sum(float(g.square().sum()) for g in path.gradient(0, moved)[1].values()) / 2

        slope = (flow(1 + 1e-5) - flow(1 - 1e-5)) / 2e-5
    assert float(scores[1, 2]) == pytest.approx(slope, rel=1e-6)


def test_the_largest_signed_score_stays() -> None:
    module = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, -1.0, 3.0]]))
    # loss 1/2 sum_i h_i (w_i - c_i)^2: H g = h^2 (w - c), scores w h^2 (w - c) = 8, -8, -6, 0 by hand
    curvature, center = torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.tensor([-1.0, 6.0, -7.0, 3.0])

    def loss(module: Any, batch: Any) -> Tensor:
        return 0.5 * (curvature * (module.weight[0] - center).square()).sum()

    prune(module, GraSP(sparsity=0.5), [torch.zeros(1)], loss)
    assert MaskManager.of(module).masks["weight"].tolist() == [[True, False, False, True]]


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    losses = Losses(lambda step: [lambda theta: theta["w"].sum().log()])
    with pytest.raises(ValueError, match="loss of calibration batch 0 is not finite"):
        grasp_scores(losses, {"w": torch.tensor([-1.0])})


# temperature


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def entropy_past_forward(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module.forward(batch[0]), batch[1])


def scaled_entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]) / 5.0, batch[1])


def test_the_temperature_divides_the_logits(tiny_class: Any, loader: DataLoader) -> None:
    batches = list(loader)
    masks = []
    for temperature, loss in ((5.0, entropy), (1.0, scaled_entropy), (1.0, entropy)):
        torch.manual_seed(0)
        module = tiny_class()
        receipt = prune(module, GraSP(sparsity=0.7, temperature=temperature), batches, loss)
        assert not any("temperature" in note for note in receipt.notes)
        assert len(module._forward_hooks) == 0
        masks.append(MaskManager.of(module).masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


def test_a_temperature_without_logits_is_said_to_have_no_effect(tiny: Any, loader: DataLoader) -> None:
    receipt = prune(tiny, GraSP(sparsity=0.7), list(loader), entropy_past_forward)
    assert any(note.startswith("`temperature`=200 had no effect") for note in receipt.notes)


# balanced batches


def stream_of(labels: list[list[int]]) -> BatchStream:
    """Batches (number of the sample, its class)."""
    batches, begin = [], 0
    for row in labels:
        batches.append((torch.arange(begin, begin + len(row)), torch.tensor(row)))
        begin += len(row)
    return BatchStream(Objective(nn.Linear(1, 1), lambda count: batches, loss_fn=lambda module, batch: batch))


def test_a_balanced_batch_takes_the_first_samples_of_every_class() -> None:
    indices, labels = balanced_batch(stream_of([[0, 0, 0, 1], [1, 0, 2, 2]]), 2, 3)
    assert indices.tolist() == [0, 1, 3, 4, 6, 7]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_class_without_enough_samples_is_named() -> None:
    with pytest.raises(ValueError, match="asks for more samples of class 1, 2 than one pass over the data holds"):
        balanced_batch(stream_of([[0, 1], [0, 2]]), 2, 3)


def test_a_class_number_beyond_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_classes`=2 is too small for the class number 3"):
        balanced_batch(stream_of([[0, 3]]), 1, 2)


def test_batches_without_class_numbers_are_refused() -> None:
    stream = BatchStream(Objective(nn.Linear(1, 1), lambda count: [torch.ones(2)], loss_fn=lambda m, b: b))
    with pytest.raises(ValueError, match="needs batches"):
        balanced_batch(stream, 1, 2)


def test_balanced_batches_are_used_by_the_callback(tiny: Any, dataset: Any) -> None:
    seen: list[list[int]] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[1].tolist())
        return entropy(module, batch)

    callback = GraSP(sparsity=0.5, samples_per_class=2, num_classes=3, batches=2)
    prune(tiny, callback, DataLoader(dataset, batch_size=4), loss)
    assert len(seen) == 4
    assert all(sorted(labels) == [0, 0, 1, 1, 2, 2] for labels in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0, got 0.0"),
        ({"batches": 0}, "`batches` must be an integer >= 1"),
        (
            {"samples_per_class": 10},
            "`samples_per_class` and `num_classes` must be given together, got 10 and None",
        ),
        ({"num_classes": 10}, "must be given together, got None and 10"),
        ({"backend": "numeric"}, "`backend` must be one of 'reverse_over_reverse', 'forward_over_reverse'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraSP(sparsity=0.5, **arguments)
