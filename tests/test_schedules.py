"""Schedules, moments and ramps: values of the papers, ends, order, and every refusal."""

from __future__ import annotations

import math

import pytest

from lightning_prune.schedules import (
    SCHEDULES,
    Moment,
    Position,
    Ramp,
    check_bound,
    check_schedule,
    cubic,
    geometric,
    linear,
    parse_at,
)

GROWING = ["cubic", "linear", "geometric"]


def test_the_cubic_schedule_has_the_values_of_the_paper():
    """Zhu and Gupta (2017), equation 1, final sparsity 0.9 in 10 updates."""
    expected = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    assert [cubic(update / 10, 0.0, 0.9) for update in range(11)] == pytest.approx(expected, abs=1e-12)


def test_the_cubic_schedule_from_an_initial_sparsity_by_hand():
    assert cubic(0.5, 0.2, 0.6) == pytest.approx(0.6 - 0.4 / 8)


def test_the_linear_schedule_is_half_way_in_the_middle():
    assert linear(0.5, 0.1, 0.5) == pytest.approx(0.3)


def test_the_geometric_schedule_multiplies_the_density():
    densities = [1 - geometric(progress, 0.0, 0.75) for progress in (0.0, 0.5, 1.0)]
    assert densities == pytest.approx([1.0, 0.5, 0.25])


def test_the_constant_schedule_is_final_at_once():
    assert [SCHEDULES["constant"](progress, 0.1, 0.9) for progress in (-1, 0, 0.5, 1, 2)] == [0.9] * 5


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(("initial", "final"), [(0.1, 0.9), (0.3, 0.7), (0.0, 0.98), (0.29, 0.29), (0.1, 0.999)])
def test_both_ends_are_exact_and_kept(name, initial, final):
    schedule = SCHEDULES[name]
    assert [schedule(progress, initial, final) for progress in (-5.0, -1e-9, 0.0)] == [initial] * 3
    assert [schedule(progress, initial, final) for progress in (1.0, 1.0 + 1e-9, 7.0, math.inf)] == [final] * 4


@pytest.mark.parametrize("name", GROWING)
def test_values_never_fall_and_stay_within_the_ends(name):
    values = [SCHEDULES[name](step / 1000, 0.1, 0.9) for step in range(1001)]
    assert values == sorted(values)
    assert min(values) == 0.1
    assert max(values) == 0.9


def test_another_schedule_is_refused_with_all_names():
    assert check_schedule("cubic") == "cubic"
    with pytest.raises(ValueError, match="`schedule` must be one of 'cubic', 'linear', 'geometric', 'constant'"):
        check_schedule("cosine")


@pytest.mark.parametrize("at", ["start", "end", 0, 7, 0.25])
def test_one_moment_takes_the_target(at):
    assert parse_at(at, 0.9) == (Moment(at, 0.9),)


@pytest.mark.parametrize(
    "at",
    [
        [("start", 0.2), (3, 0.5), (6, 0.9), ("end", 0.95)],
        [["start", 0.2], [0.5, 0.5], [0.75, 0.5]],
        ((2, 0.0), (0.9, 0.5)),
    ],
)
def test_pairs_become_moments_in_order(at):
    assert parse_at(at, None) == tuple(Moment(when, target) for when, target in at)


@pytest.mark.parametrize("at", ["begin", "", -1, 0.0, 1.0, 1.5, -0.5])
def test_a_moment_of_another_form_is_refused(at):
    with pytest.raises(ValueError, match="`at` must be"):
        parse_at(at, 0.9)


@pytest.mark.parametrize("at", [None, True, math.nan, math.inf, [], [3], [(3,)], [(3, 0.5, 1)], ["ab"], {"start": 0.5}])
def test_what_is_neither_moment_nor_pairs_is_refused_with_all_forms(at):
    with pytest.raises(
        ValueError, match=r"`at` must be 'start', 'end', an int .* or a list of \(when, sparsity\) pairs"
    ):
        parse_at(at, 0.9)


@pytest.mark.parametrize("when", [True, None, -1, 1.0, "later", [1]])
def test_a_pair_with_another_moment_is_refused(when):
    with pytest.raises(ValueError, match="`at` must be"):
        parse_at([(when, 0.5)], None)


@pytest.mark.parametrize("value", [90, 1.0, -0.1, "0.5", math.nan, None])
def test_a_pair_with_a_sparsity_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"`at` must be in \[0, 1\)"):
        parse_at([(3, value)], None)


def test_sparsities_that_fall_are_refused():
    with pytest.raises(ValueError, match=r"sparsities that do not fall, got 0\.5 before 0\.4"):
        parse_at([(1, 0.5), (2, 0.4)], None)


@pytest.mark.parametrize(
    "at",
    [
        [(3, 0.1), (3, 0.2)],
        [(3, 0.1), (2, 0.2)],
        [(0.5, 0.1), (0.25, 0.2)],
        [(3, 0.1), ("start", 0.2)],
        [("end", 0.1), (3, 0.2)],
        [("end", 0.1), (0.5, 0.2)],
        [("end", 0.1), ("start", 0.2)],
        [("start", 0.1), ("start", 0.2)],
        [(3, 0.1), (0.5, 0.2), (2, 0.3)],
    ],
)
def test_moments_out_of_order_are_refused(at):
    with pytest.raises(ValueError, match="`at` must list moments in order, got"):
        parse_at(at, None)


def test_the_start_is_always_reached_and_the_end_only_when_the_fit_has_ended():
    first, last = Position(step=0, epoch=0, progress=0.0), Position(step=9, epoch=3, progress=1.0, ended=True)
    assert [Moment("start", 0.5).reached(position) for position in (first, last)] == [True, True]
    assert [Moment("end", 0.5).reached(position) for position in (first, last)] == [False, True]


def test_an_epoch_is_reached_when_so_many_are_done():
    reached = [Moment(2, 0.5).reached(Position(step=0, epoch=epoch)) for epoch in range(4)]
    assert reached == [False, False, True, True]


def test_a_fraction_is_reached_in_spite_of_rounding():
    assert 0.1 + 0.2 != 0.3
    assert Moment(0.1 + 0.2, 0.5).reached(Position(step=3, epoch=0, progress=0.3))
    assert not Moment(0.3, 0.5).reached(Position(step=2, epoch=0, progress=0.2))
    assert not Moment(0.3, 0.5).reached(Position(step=2, epoch=0, progress=None))


@pytest.mark.parametrize("when", ["end", 99, 0.99])
def test_every_moment_has_come_when_the_fit_has_ended(when):
    assert Moment(when, 0.5).reached(Position(step=1, epoch=0, progress=0.1, ended=True))


def walk(ramp: Ramp, total: int | None) -> list[int]:
    bounds, step, steps = ramp.bounds(total), -1, []
    while (due := ramp.next_due(step, bounds)) is not None:
        steps.append(due)
        step = due
    return steps


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(0, 10, 5), [0, 5, 10]),
        (Ramp(0, 10, 4), [0, 4, 8, 10]),
        (Ramp(3, 4, 100), [3, 4]),
        (Ramp(6, 6, 1), [6]),
        (Ramp(0, 0, 1), [0]),
        (Ramp(0.25, 0.75, 3), [5, 8, 11, 14, 15]),
        (Ramp(0.0, 1.0, 20), [0, 20]),
    ],
)
def test_a_ramp_acts_on_its_grid_and_at_its_end(ramp, expected):
    assert walk(ramp, 20) == expected


def test_a_ramp_catches_up_on_its_grid_after_steps_it_missed():
    ramp = Ramp(2, 12, 4)
    assert [ramp.next_due(step, (2, 12)) for step in (-1, 0, 1, 2, 3, 5, 6, 9, 11, 12, 50)] == [
        2, 2, 2, 6, 6, 6, 10, 10, 12, None, None,
    ]  # fmt: skip


def test_steps_need_no_length_of_the_fit():
    assert Ramp(2, 12, 4).bounds(None) == (2, 12)


def test_fractions_need_a_length_of_the_fit():
    with pytest.raises(ValueError, match=r"`begin`=0\.5 is a fraction of the fit, whose length is not known"):
        Ramp(0.5, 100, 1).bounds(None)


def test_a_begin_after_the_end_is_refused():
    with pytest.raises(ValueError, match="`begin` must not lie after `end`, got steps 15 and 10"):
        Ramp(15, 0.5, 1).bounds(20)


def test_an_end_beyond_the_fit_is_refused():
    with pytest.raises(ValueError, match="`end` must lie within the fit of 20 optimizer steps, got 21"):
        Ramp(0, 21, 1).bounds(20)


@pytest.mark.parametrize("bound", [0, 100, 0.0, 0.5, 1.0])
def test_bounds_are_steps_or_fractions(bound):
    assert check_bound("end", bound) == bound
    assert type(check_bound("end", bound)) is type(bound)


@pytest.mark.parametrize("bound", [-1, 1.5, -0.1, math.nan, True, "0.5", None])
def test_a_bound_of_another_form_is_refused(bound):
    with pytest.raises(ValueError, match=r"`end` must be an int >= 0 .* or a float in \[0, 1\]"):
        check_bound("end", bound)
