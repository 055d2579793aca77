"""The warm-up and cosine schedule: values by hand, clamping, refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.recipes.schedules import cosine_factor, restarting_cosine, restarting_factor, warmup_cosine


def test_the_rate_rises_linearly_then_follows_half_a_cosine():
    factors = [cosine_factor(step, total_steps=7, warmup_steps=3) for step in range(8)]
    # cos of 0, 45, 90, 135 and 180 degrees
    half = 0.5**0.5
    expected = [1 / 4, 2 / 4, 3 / 4, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert cosine_factor(0, total_steps=10, warmup_steps=0) == 1.0


def test_the_factor_stays_zero_after_the_end():
    assert cosine_factor(11, total_steps=10, warmup_steps=2) == cosine_factor(10, 10, 2) == 0.0


def test_every_group_keeps_its_own_peak():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.5}])
    scheduler = warmup_cosine(optimizer, total_steps=4, warmup_fraction=0.5)
    seen = []
    for _ in range(4):
        seen.extend(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1 / 3, 1 / 6, 2 / 3, 1 / 3, 1.0, 0.5, 0.5, 0.25])


def test_a_restored_scheduler_continues_where_it_was():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    first = warmup_cosine(optimizer, total_steps=10)
    for _ in range(4):
        optimizer.step()
        first.step()
    second = warmup_cosine(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), total_steps=10)
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == [cosine_factor(5, total_steps=10, warmup_steps=1)]


@pytest.mark.parametrize(("argument", "value"), [("total_steps", 0), ("warmup_fraction", 1.0)])
def test_an_argument_out_of_range_is_refused(argument: str, value: float):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        warmup_cosine(optimizer, **{"total_steps": 5, argument: value})


def test_short_cosines_come_before_a_long_one():
    factors = [restarting_factor(step, 8, restarts=2, interval=2, final_factor=0.0) for step in range(9)]
    half = 0.5**0.5
    expected = [1.0, 0.5, 1.0, 0.5, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_a_cosine_falls_to_the_final_factor():
    assert restarting_factor(10, 10, restarts=0, interval=1, final_factor=0.25) == 0.25
    assert restarting_factor(5, 10, restarts=0, interval=1, final_factor=0.2) == pytest.approx(0.6)


def test_the_warm_up_stays_at_the_peak():
    factors = [
        restarting_factor(step, 6, restarts=1, interval=2, final_factor=0.0, warmup_steps=2) for step in range(7)
    ]
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.5, 1.0, 0.5, 0.0], abs=1e-12)


def test_the_rate_is_back_at_its_peak_at_every_pruning():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = restarting_cosine(optimizer, total_steps=500, restarts=6, interval_fraction=0.1)
    rates = []
    for _ in range(500):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [step for step, rate in enumerate(rates) if rate == pytest.approx(0.1, rel=1e-9)] == list(range(0, 301, 50))
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("total_steps", 0, "`total_steps` must be"),
        ("restarts", -1, "`restarts` must be"),
        ("interval_fraction", 1.0, "`interval_fraction` must be"),
        ("final_factor", 1.0, "`final_factor` must be"),
        ("warmup_fraction", -0.1, "`warmup_fraction` must be"),
        ("interval_fraction", 0.2, "must leave a part of the fit, got 6 intervals of 20 of 100 steps"),
    ],
)
def test_restarts_out_of_range_are_refused(argument: str, value: float, message: str):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=message):
        restarting_cosine(optimizer, **{"total_steps": 100, argument: value})
