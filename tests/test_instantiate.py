"""Callbacks from configurations: mappings and lists, of Hydra's or of Python's own types."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback, Timer
from omegaconf import OmegaConf

from lightning_prune import Magnitude, RandomPruning, instantiate_callbacks

MAGNITUDE = {"_target_": "lightning_prune.methods.magnitude.Magnitude", "sparsity": 0.5}
RANDOM = {"_target_": "lightning_prune.RandomPruning", "at": [["start", 0.25], [1, 0.5]], "include": ["head"]}


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_a_mapping_gives_a_list_in_its_order(wrap):
    callbacks = instantiate_callbacks(wrap({"pruning": MAGNITUDE, "control": RANDOM}))
    assert [type(callback) for callback in callbacks] == [Magnitude, RandomPruning]
    assert callbacks[0].sparsity == 0.5


@pytest.mark.parametrize("wrap", [list, OmegaConf.create])
def test_a_list_gives_a_list_in_its_order(wrap):
    assert [type(c) for c in instantiate_callbacks(wrap([RANDOM, MAGNITUDE]))] == [RandomPruning, Magnitude]


@pytest.mark.parametrize("empty", [None, {}, [], OmegaConf.create({}), OmegaConf.create([])])
def test_nothing_gives_no_callbacks(empty):
    assert instantiate_callbacks(empty) == []


def test_null_and_empty_nodes_are_dropped():
    cfg = OmegaConf.create({"pruning": None, "timer": {}, "control": MAGNITUDE})
    assert [type(callback) for callback in instantiate_callbacks(cfg)] == [Magnitude]
    assert instantiate_callbacks({"pruning": None}) == []


def test_arguments_arrive_as_plain_python_values():
    (callback,) = instantiate_callbacks(OmegaConf.create({"pruning": RANDOM}))
    assert type(callback.at) is list
    assert type(callback.at[0]) is list
    assert callback.include == ("head",)


def test_interpolations_are_resolved():
    cfg = OmegaConf.create({"target": 0.75, "callbacks": {"pruning": {**MAGNITUDE, "sparsity": "${target}"}}})
    assert instantiate_callbacks(cfg.callbacks)[0].sparsity == 0.75


def test_ready_made_callbacks_pass_through():
    timer, other = Timer(), Callback()
    assert instantiate_callbacks([timer, MAGNITUDE])[0] is timer
    assert instantiate_callbacks({"timer": timer, "other": other}) == [timer, other]
    assert instantiate_callbacks(timer) == [timer]


def test_a_group_written_with_a_plus_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"callback 'pruning' must be a node .* got 'chita'\. Write pruning=chita"):
        instantiate_callbacks({"pruning": "chita"})


def test_a_node_without_a_target_is_refused_with_its_keys():
    cfg = OmegaConf.create({"pruning": {"sparsity": 0.5, "at": "start"}})
    with pytest.raises(ValueError, match=r"callback 'pruning' must have a `_target_`, got keys \['at', 'sparsity'\]"):
        instantiate_callbacks(cfg)


@pytest.mark.parametrize("node", [3, 0.5, True, ["a"], [MAGNITUDE]])
def test_an_entry_that_is_no_node_is_refused(node):
    with pytest.raises(ValueError, match="callback 'pruning' must be a node with `_target_`"):
        instantiate_callbacks({"pruning": node})


def test_an_argument_that_breaks_its_rule_is_an_error():
    with pytest.raises(Exception, match=r"`sparsity` must be in \[0, 1\), got 90"):
        instantiate_callbacks({"pruning": {**MAGNITUDE, "sparsity": 90}})


def test_a_key_that_is_not_understood_fails():
    with pytest.raises(Exception, match="sparsty"):
        instantiate_callbacks({"pruning": {**MAGNITUDE, "sparsty": 0.5}})


class Budgeted(Callback):
    def __init__(self, budget: float = 0.5) -> None:
        self.budget = budget


class Penalized(Callback):
    def __init__(self, penalty: float = 0.5) -> None:
        self.penalty = penalty


class Inherited(Budgeted):
    def __init__(self, extra: int = 0, **common) -> None:
        super().__init__(**common)


@pytest.mark.parametrize("kind", ["Budgeted", "Inherited"])
def test_a_sparsity_sets_the_budget_of_a_method_without_one(kind):
    node = {"_target_": f"{__name__}.{kind}", "sparsity": 0.9}
    assert instantiate_callbacks({"pruning": node})[0].budget == 0.1
    assert instantiate_callbacks({"pruning": {**node, "sparsity": None}})[0].budget == 0.5


def test_a_sparsity_for_a_method_without_a_target_is_refused():
    node = {"_target_": f"{__name__}.Penalized", "sparsity": 0.9}
    with pytest.raises(ValueError, match="which takes neither a sparsity nor a budget"):
        instantiate_callbacks({"pruning": node})
    assert instantiate_callbacks({"pruning": {**node, "sparsity": None}})[0].penalty == 0.5


def test_a_percentage_is_refused_before_it_becomes_a_budget():
    with pytest.raises(ValueError, match="Give a fraction, not a percentage"):
        instantiate_callbacks({"pruning": {"_target_": f"{__name__}.Budgeted", "sparsity": 90}})


def test_the_knob_without_a_method_is_no_callback():
    assert instantiate_callbacks({"pruning": {"sparsity": 0.9}}) == []
