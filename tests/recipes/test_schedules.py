"""The warm-up and cosine schedule: values by hand, clamping, refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.recipes.schedules import cosine_factor, warmup_cosine


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
