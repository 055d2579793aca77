"""Batches joined and counted, and BatchNorm layers that take a batch's statistics for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.batch_norm import averaging, in_training, named_batch_norms
from lightning_prune.batches import count_samples, joined, sample_count


def parts(*sizes: int) -> list[tuple[Tensor, int, int]]:
    """Batches of these sizes whose samples are counted on, with their indices."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(torch.arange(s, s + size), size, i) for i, (s, size) in enumerate(zip(starts, sizes, strict=True))]


@pytest.mark.parametrize(
    ("most", "expected"), [(4, [4, 3, 4, 1]), (7, [7, 5]), (100, [12]), (1, [4, 3, 4, 1]), (5, [4, 3, 5])]
)
def test_neighbours_are_joined_while_they_fit(most: int, expected: list[int]) -> None:
    found = list(joined(parts(4, 3, 4, 1), most))
    assert [count for _, count, _ in found] == expected
    assert torch.equal(torch.cat([batch for batch, _, _ in found]), torch.arange(12))


def test_ragged_batches_stay_apart() -> None:
    ragged: list[Any] = [(torch.zeros(2, 3), 2, 0), (torch.zeros(2, 4), 2, 1), (torch.zeros(1, 4), 1, 2)]
    assert [(tuple(batch.shape), count) for batch, count, _ in joined(ragged, 100)] == [((2, 3), 2), ((3, 4), 3)]


def test_nothing_is_joined_from_nothing() -> None:
    assert list(joined([], 8)) == []


def test_counting_stops_at_the_limit() -> None:
    read = []

    def batches() -> Any:
        for size in (3, 4, 5):
            read.append(size)
            yield torch.zeros(size)

    assert count_samples(batches(), 7) == 7
    assert read == [3, 4]
    assert count_samples(batches(), 100) == 12
    assert sample_count({"no": "tensor"}) == 1


def test_layers_train_for_a_while_and_are_named_by_path() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)))
    net.eval()
    norms = named_batch_norms(net)
    assert list(norms) == ["1.0"]
    seen: list[bool] = []

    def fail() -> None:
        with in_training(norms.values()):
            seen.extend(module.training for module in net.modules())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert seen == [False, False, False, True, False]
    assert not any(module.training for module in net.modules())


def test_statistics_start_anew_as_a_plain_mean_and_momentum_comes_back() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.3).eval()
    buffers = {name: buffer.clone() + 5 for name, buffer in norm.named_buffers()}
    data = [torch.randn(8, 2) + 1, torch.randn(8, 2) - 1]
    with averaging({"": norm}, buffers):
        for batch in data:
            torch.func.functional_call(norm, buffers, (batch,))
    expected = torch.stack([batch.mean(0) for batch in data]).mean(0)
    torch.testing.assert_close(buffers["running_mean"], expected)
    assert norm.momentum == 0.3
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert not norm.training
