"""The search for the highest sparsity: the bisection on made-up curves, and a small search of the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from lightning_prune import _search_run
from lightning_prune._search_report import markdown
from lightning_prune._search_run import knob_of, run_search
from lightning_prune.receipt import Receipt
from lightning_prune.search import Point, SearchResult, find_highest, midpoint, standard_error

QUICK = [
    "data.subset=400", "dense.max_epochs=3", "trainer.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.05",
    "trainer.enable_progress_bar=false", "callbacks.progress=null",
]  # fmt: skip


def curve(limit: float, calls: list[tuple[float, str]] | None = None) -> Callable[[float, str], Point]:
    """An evaluation that is feasible up to a sparsity."""

    def evaluate(sparsity: float, role: str) -> Point:
        if calls is not None:
            calls.append((sparsity, role))
        return Point(sparsity=sparsity, accuracy=1.0, needed=0.0, feasible=sparsity <= limit, role=role)

    return evaluate


def test_the_midpoint_halves_the_logarithm_of_what_is_kept() -> None:
    assert midpoint(0.0, 0.99) == pytest.approx(0.9)
    assert 1 - midpoint(0.5, 0.98) == pytest.approx(math.sqrt(0.5 * 0.02), abs=1e-4)


def test_the_midpoint_of_close_ends_lies_between_them() -> None:
    assert 0.99998 < midpoint(0.99998, 0.99999) < 0.99999


@pytest.mark.parametrize("limit", [0.1, 0.33, 0.5, 0.72, 0.9, 0.95, 0.98])
def test_a_monotone_curve_is_solved_to_five_percent_of_what_is_kept(limit: float) -> None:
    result = find_highest(curve(limit))
    assert result.best is not None
    assert result.best.sparsity <= limit
    assert (1 - result.best.sparsity) / (1 - limit) <= 1.05 + 1e-6
    assert result.confirmed is True
    assert len(result.points) <= 10


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 10])
def test_never_more_evaluations_than_allowed(budget: int) -> None:
    calls: list[tuple[float, str]] = []
    find_highest(curve(0.8, calls), max_evaluations=budget)
    assert len(calls) <= budget


def test_what_is_returned_was_measured_feasible() -> None:
    for limit in (0.0, 0.001, 0.5, 0.97):
        calls: list[tuple[float, str]] = []
        result = find_highest(curve(limit, calls), max_evaluations=5)
        if result.best is not None:
            assert (result.best.sparsity, "search") in calls
            assert result.best.feasible


def test_nothing_feasible_gives_nothing() -> None:
    result = find_highest(curve(-1.0))
    assert (result.best, result.confirmed) == (None, None)


def test_a_failed_confirmation_steps_back_to_the_next_feasible_point() -> None:
    def evaluate(sparsity: float, role: str) -> Point:
        limit = 0.85 if role == "confirmation" else 0.95
        return Point(sparsity=sparsity, accuracy=1.0, needed=0.0, feasible=sparsity <= limit, role=role)

    result = find_highest(evaluate, max_evaluations=10, tolerance=0.5)
    tried = [point.sparsity for point in result.points if point.role == "confirmation"]
    searched = sorted((p.sparsity for p in result.points if p.role == "search" and p.feasible), reverse=True)
    assert tried == searched[: len(tried)]
    assert result.best is None or result.best.sparsity <= 0.85 or result.confirmed is None


def test_without_evaluations_left_the_point_is_said_to_be_unconfirmed() -> None:
    result = find_highest(curve(0.95), max_evaluations=1)
    assert result.best is not None
    assert result.confirmed is None


def test_the_standard_error_of_an_accuracy() -> None:
    assert standard_error(0.9, 100) == pytest.approx(0.03)
    assert standard_error(0.9, None) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sparsity": 0.0}, "must be in \\(0, 1\\), got 0"),
        ({"max_sparsity": 1.5}, "`max_sparsity` must be in \\[0, 1\\), got 1.5"),
        ({"max_evaluations": 0}, "`max_evaluations` must be an integer >= 1"),
        ({"tolerance": 0.0}, "`tolerance` must be above 0"),
    ],
)
def test_settings_that_break_their_rule_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_highest(curve(0.5), **settings)


def composed(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune", overrides=[*QUICK, "pruning=magnitude", *overrides])
    cfg.trainer.default_root_dir = str(folder)
    cfg.callbacks.checkpoint.dirpath = str(folder)
    return cfg


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    run_search(composed(folder, "search.max_drop=0.3", "search.max_evaluations=4", "search.max_sparsity=0.9"), folder)
    return folder


def test_a_search_leaves_the_best_run_and_its_evaluations(searched: Path) -> None:
    facts = json.loads((searched / "search.json").read_text())
    assert 1 <= len(facts["points"]) <= 4
    assert all(point["needed"] >= facts["floor"] for point in facts["points"])
    receipt = Receipt.load(searched / "receipt.json")
    assert receipt.requested["sparsity"] == facts["best"]["sparsity"]
    assert receipt.accuracy["finetuned"] == facts["best"]["test_accuracy"]
    assert receipt.accuracy["finetuned"] >= receipt.accuracy["dense"] - 0.3
    assert facts["best"]["accuracy"] >= facts["best"]["needed"] > facts["floor"]
    assert (searched / "search.png").exists()
    assert len(list(searched.rglob("dense.ckpt"))) == 1


def test_an_interrupted_search_goes_on_without_repeating(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((searched / "search.json").read_text())
    lost = searched / before["points"][-1]["folder"]
    (lost / "receipt.json").unlink()
    runs: list[Path] = []
    real = _search_run.pipeline.run
    monkeypatch.setattr(
        _search_run.pipeline, "run", lambda cfg, folder: (runs.append(Path(folder)), real(cfg, folder))[1]
    )
    run_search(
        composed(searched, "search.max_drop=0.3", "search.max_evaluations=4", "search.max_sparsity=0.9"), searched
    )
    assert runs == [lost]
    after = json.loads((searched / "search.json").read_text())
    assert after["points"] == before["points"]


def test_another_drop_reads_what_was_measured(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((searched / "search.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in searched.rglob("pruned.ckpt") if path.parent != searched}
    run_search(
        composed(searched, "search.max_drop=0.29", "search.max_evaluations=5", "search.max_sparsity=0.9"), searched
    )
    after = json.loads((searched / "search.json").read_text())
    assert after["points"][0]["accuracy"] == before["points"][0]["accuracy"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(after["points"]) <= 5


def test_another_split_is_measured_anew(searched: Path) -> None:
    settings = ["search.max_drop=0.3", "search.max_evaluations=1", "search.max_sparsity=0.9", "search.split=test"]
    run_search(composed(searched, *settings), searched)
    facts = json.loads((searched / "search.json").read_text())
    assert (facts["split"], facts["samples"]) == ("test", 360)
    assert facts["dense_accuracy"] == facts["dense_test_accuracy"]
    assert facts["points"][0]["accuracy"] == facts["points"][0]["test_accuracy"]


def test_a_failing_evaluation_is_infeasible_and_named(tmp_path: Path) -> None:
    cfg = composed(
        tmp_path,
        "search.max_drop=0.3",
        "search.max_evaluations=1",
        "search.max_sparsity=0.999",
        "callbacks.pruning.layer_floor=0.08",
    )
    run_search(cfg, tmp_path)
    facts = json.loads((tmp_path / "search.json").read_text())
    assert facts["best"] is None
    assert "`layer_floor` must not exceed" in facts["points"][0]["error"]
    assert not (tmp_path / "receipt.json").exists()


@pytest.mark.parametrize(
    ("node", "knob"),
    [
        ({"sparsity": 0.9, "budget": None}, "sparsity"),
        ({"budget": 0.5}, "budget"),
        ({"sparsity": None, "budget": 0.5}, "budget"),
    ],
)
def test_the_knob_is_what_the_method_is_given(node: dict[str, Any], knob: str) -> None:
    assert knob_of(OmegaConf.create({"callbacks": {"pruning": node}})) == knob


def test_a_search_needs_a_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`search.max_drop` needs a method with a `sparsity` or a `budget`"):
        knob_of(OmegaConf.create({"callbacks": {}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.max_drop=1.5", "`search.max_drop` must be in"), ("search.split=train", "`search.split` must be one of"),
        ("search.margin=-1", "`search.margin` must be >= 0"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_before_any_training(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_search(composed(tmp_path, "search.max_drop=0.1", override), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_few_samples_are_said_to_be_too_few() -> None:
    facts = {
        "knob": "sparsity", "split": "val", "samples": 20, "dense_accuracy": 0.9, "max_drop": 0.01, "margin": 1.0,
        "floor": 0.89,
    }  # fmt: skip
    result = SearchResult(best=None, confirmed=None)
    assert "20 samples cannot tell" in markdown(facts, result)
    assert "cannot tell" not in markdown({**facts, "samples": 10**6}, result)
    assert "stays within 1 point of dense. The dense network stays." in markdown(facts, result)
    point = Point(sparsity=0.5, accuracy=0.9, needed=0.89, feasible=True)
    assert "of 1 that were feasible once, none was again" in markdown(
        facts, SearchResult(best=None, confirmed=None, points=[point])
    )
