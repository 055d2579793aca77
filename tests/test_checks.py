"""Argument checks: what passes, and what each refusal says."""

from __future__ import annotations

import math

import pytest

from lightning_prune.checks import (
    check_bool,
    check_choice,
    check_fraction,
    check_integer,
    check_positive,
    is_number,
)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999999])
def test_a_fraction_passes_as_a_float(value):
    checked = check_fraction("sparsity", value)
    assert checked == value
    assert type(checked) is float


def test_a_percentage_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\), got 90\. Give a fraction, not a percentage"):
        check_fraction("sparsity", 90)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, math.nan, math.inf, -math.inf, "0.5", None, True, [0.5], 101.0])
def test_what_is_no_fraction_is_refused_with_name_and_value(value):
    with pytest.raises(ValueError, match=r"`layer_floor` must be in \[0, 1\), got .*\. Give a number such as 0\.9\."):
        check_fraction("layer_floor", value)


@pytest.mark.parametrize(("value", "expected"), [(1, True), (-2.5, True), (True, False), ("1", False), (None, False)])
def test_numbers_are_finite_ints_and_floats_only(value, expected):
    assert is_number(value) is expected
    assert not is_number(math.nan)
    assert not is_number(math.inf)


def test_an_integer_passes_down_to_its_minimum():
    assert check_integer("seed", 0, 0) == 0
    assert check_integer("rounds", 7, 1) == 7


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_what_is_no_integer_in_range_is_refused(value):
    with pytest.raises(ValueError, match=r"`rounds` must be an integer >= 1, got .*\. Count whole rounds\.$"):
        check_integer("rounds", value, 1, "Count whole rounds.")


def test_a_refusal_without_a_remedy_ends_with_the_value():
    with pytest.raises(ValueError, match=r"got -1\.$"):
        check_integer("seed", -1, 0)


def test_a_positive_number_passes_as_a_float():
    assert check_positive("penalty", 3) == 3.0
    assert type(check_positive("penalty", 3)) is float


@pytest.mark.parametrize("value", [0, -1e-9, math.nan, math.inf, "1", None, True])
def test_what_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match="`penalty` must be a finite number above 0"):
        check_positive("penalty", value)


def test_one_of_the_choices_passes():
    assert check_choice("scope", "layer", ("global", "layer")) == "layer"


@pytest.mark.parametrize("value", ["Layer", "", None, 3])
def test_another_choice_is_refused_with_all_choices(value):
    with pytest.raises(ValueError, match="`scope` must be one of 'global', 'layer', got"):
        check_choice("scope", value, ("global", "layer"))


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_only_true_and_false_are_bools(value):
    assert check_bool("mask_gradients", True) is True
    assert check_bool("mask_gradients", False) is False
    with pytest.raises(ValueError, match="`mask_gradients` must be true or false, got"):
        check_bool("mask_gradients", value)
