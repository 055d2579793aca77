"""A study over several settings: scores, bounds, and a small study where Optuna is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_search import composed

from lightning_prune import _search_run
from lightning_prune._search_optuna import check_knobs, score
from lightning_prune._search_run import run_search
from lightning_prune.search import Point

SPARSITY = "callbacks.pruning.sparsity"


def point(sparsity: float, accuracy: float | None, needed: float = 0.9) -> Point:
    feasible = accuracy is not None and accuracy >= needed
    return Point(sparsity=sparsity, accuracy=accuracy, needed=needed, feasible=feasible)


def test_a_feasible_trial_scores_its_sparsity() -> None:
    assert score(point(0.7, 0.95)) == 0.7


def test_every_feasible_trial_beats_every_other() -> None:
    assert score(point(0.99, 0.8999)) < score(point(0.0, 0.9))
    assert score(point(0.5, 0.8)) == pytest.approx(0.5 - 10 * 0.1 - 1)


def test_a_failed_trial_has_a_finite_score_below_all() -> None:
    assert math.isfinite(score(point(0.9, None, math.inf)))
    assert score(point(0.9, None, math.inf)) < score(point(0.9, 0.0))


def test_bounds_are_taken() -> None:
    assert check_knobs({SPARSITY: [0.5, 0.9], "model.optimizer.lr": [0.01, 0.1]}, "sparsity")[SPARSITY] == (0.5, 0.9)


@pytest.mark.parametrize("bounds", [0.5, [0.5], [0.9, 0.5], ["a", "b"]])
def test_other_bounds_are_refused(bounds: Any) -> None:
    with pytest.raises(ValueError, match=r"must hold \[low, high\] with low < high"):
        check_knobs({SPARSITY: bounds}, "sparsity")


def test_what_is_maximized_must_be_a_knob() -> None:
    with pytest.raises(ValueError, match="which the study maximizes"):
        check_knobs({"model.optimizer.lr": [0.01, 0.1]}, "sparsity")


def test_a_study_goes_on_and_returns_a_measured_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="needs Optuna: pip install '.[search]'")
    knobs = "search.knobs={callbacks.pruning.sparsity: [0.3, 0.9], model.optimizer.lr: [0.05, 0.1]}"
    run_search(composed(tmp_path, "search.max_drop=0.4", "search.trials=1", knobs), tmp_path)
    runs: list[Path] = []
    real = _search_run.pipeline.run
    monkeypatch.setattr(
        _search_run.pipeline, "run", lambda cfg, folder: (runs.append(Path(folder)), real(cfg, folder))[1]
    )
    run_search(composed(tmp_path, "search.max_drop=0.4", "search.trials=2", knobs), tmp_path)
    facts = json.loads((tmp_path / "search.json").read_text())
    searched = [held for held in facts["points"] if held["role"] == "search"]
    assert len(searched) == 2
    assert searched[0]["settings"] != searched[1]["settings"]  # a study that goes on does not begin again
    assert 1 <= len(runs) <= 3  # one more trial, and confirmations
    assert all(0.05 <= held["settings"]["model.optimizer.lr"] <= 0.1 for held in searched)
    if facts["best"] is not None:
        assert facts["best"] in facts["points"]
        assert facts["best"]["feasible"]
