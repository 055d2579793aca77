"""The union-find against a naive one, and reshapes against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_prune._dependency.cells import Cells
from lightning_prune._dependency.reshape import blocks


def test_union_agrees_with_a_naive_relabelling():
    rng = np.random.default_rng(0)
    cells, naive = Cells(), np.arange(201)
    assert cells.new(200).tolist() == list(range(1, 201))
    for _ in range(30):
        first, second = rng.integers(1, 201, 6), rng.integers(1, 201, 6)
        cells.union(first, second)
        for a, b in zip(first, second, strict=True):
            low, high = sorted((naive[a], naive[b]))
            naive[naive == high] = low
    assert np.array_equal(cells.find(np.arange(201)), naive)


def test_freezing_reaches_the_whole_class_and_keeps_its_first_reason():
    cells = Cells()
    first, second = cells.new(3, real=True), cells.new(3)
    cells.union(first, second)
    assert cells.freeze(second[:1], "one") == 1
    assert cells.freeze(first[:1], "two") == 0
    assert cells.is_frozen(first).tolist() == [True, False, False]
    assert cells.reason(int(first[0])) == "one"
    assert cells.reason(int(first[1])) == ""


def test_a_merge_with_a_frozen_class_freezes():
    cells = Cells()
    first, second = cells.new(2), cells.new(2, real=True)
    cells.freeze(second[:1], "why")
    cells.union(first, second)
    assert cells.is_frozen(first).tolist() == [True, False]
    assert cells.is_real(first).all()
    assert cells.reason(int(first[0])) == "why"


def test_a_fixed_position_freezes_its_partner_alone():
    cells = Cells()
    label = cells.new(3)
    cells.union(label, np.array([0, label[1], label[2]]))
    assert cells.is_frozen(label).tolist() == [True, False, False]


def test_dims_of_one_or_of_unknown_size_get_no_cells():
    cells = Cells()
    assert cells.new(1) is None
    assert cells.new(10**7) is None


def test_many_cells_grow_the_store():
    cells = Cells()
    label = cells.new(10_000)
    cells.union(label[:-1], label[1:])
    assert np.unique(cells.find(label)).tolist() == [1]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 3, 4), (2, 12), [([0], [0]), ([1, 2], [1])]),
        ((2, 12), (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 1, 6), (2, 6, 1), [([0], [0]), ([2], [1])]),
        ((4, 6), (8, 3), [([0, 1], [0, 1])]),
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((1,), (), []),
    ],
)
def test_blocks_are_minimal(before, after, expected):
    assert blocks(before, after) == expected
