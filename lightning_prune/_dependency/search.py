"""Search over the choices at reshapes: whole analyses are cheap, so the best one is taken."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune._dependency import (  # noqa: F401 (rules register themselves)
    reshape,
    rules_contract,
    rules_index,
    rules_norm,
    rules_pointwise,
    rules_shape,
)
from lightning_prune._dependency.groups import close, prunable_elements
from lightning_prune._dependency.trace import Graph
from lightning_prune._dependency.walk import Decision, Walk

_REPAIRS = 6  # rounds in which choices that ended frozen move on
_FLIPS = 24
_GAIN = 1.001  # a flip must enlarge what can be pruned by more than 0.1 %


@dataclass
class _Candidate:
    score: int
    walk: Walk
    choices: dict[Any, int]


def analyse(graphs: Sequence[Graph], module: nn.Module, pinned: Sequence[str] = (), time_limit: float = 20.0) -> Walk:
    """Return the analysis with the most prunable parameter elements found within the limits.

    Args:
        graphs: traced calls of `module`; constraints of all add up.
        module: what was traced, with the same parameter names.
        pinned: parameters none of whose dims may change.
        time_limit: no new flip starts after this many seconds of this thread's processor time.
    """
    start = time.thread_time()
    best = _repaired(graphs, module, pinned, {})
    once = time.thread_time() - start
    tried: set[tuple[Any, int]] = set()
    while len(tried) < _FLIPS and time.thread_time() - start + once < time_limit:
        flip = _next_flip(best.walk.decisions, tried)
        if flip is None:
            break
        tried.add(flip)
        kind, option = flip
        moved = {d.key: min(option, d.options - 1) for d in best.walk.decisions if d.kind == kind}
        other = _repaired(graphs, module, pinned, {**best.choices, **moved})
        if other.score > best.score * _GAIN:
            best = other
    return best.walk


def _repaired(graphs: Sequence[Graph], module: nn.Module, pinned: Sequence[str], choices: dict[Any, int]) -> _Candidate:
    """Analyse; move choices whose cells ended frozen to their next alternative; repeat; keep the best."""
    best: _Candidate | None = None
    for _ in range(_REPAIRS):
        walk = Walk(graphs, module, choices, pinned)
        close(walk)
        score = prunable_elements(walk)
        if best is None or score > best.score:
            best = _Candidate(score, walk, choices)
        dead = [d for d in walk.decisions if d.chosen < d.options - 1 and _ended_frozen(walk, d)]
        if not dead:
            break
        choices = {**choices, **{d.key: d.chosen + 1 for d in dead}}
    assert best is not None
    return best


def _ended_frozen(walk: Walk, decision: Decision) -> bool:
    return decision.cells is not None and bool(walk.cells.is_frozen(decision.cells).all())


def _next_flip(decisions: Sequence[Decision], tried: set[tuple[Any, int]]) -> tuple[Any, int] | None:
    chosen: dict[Any, set[int]] = defaultdict(set)
    options: dict[Any, int] = defaultdict(int)
    for decision in decisions:
        chosen[decision.kind].add(decision.chosen)
        options[decision.kind] = max(options[decision.kind], decision.options)
    for kind, count in options.items():
        for option in range(count):
            if (kind, option) not in tried and chosen[kind] != {option}:
                return kind, option
    return None
