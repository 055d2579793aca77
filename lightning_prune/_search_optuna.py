"""Several settings at once: an Optuna study whose trials are evaluations of the search.

The score of a trial is its sparsity where it is feasible, else sparsity - 10 (needed - accuracy) - 1: every feasible trial
beats every other.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lightning_prune.checks import check_integer, is_number
from lightning_prune.search import Point, SearchResult

if TYPE_CHECKING:
    from lightning_prune._search_run import Evaluator

STUDY_FILE = "study.log"


def study(evaluator: Evaluator) -> SearchResult:
    """Run (or go on with) the study that `search.knobs` describes, and confirm its best trial.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: a knob is not `[low, high]`, or the one that sets how much is pruned is missing.
    """
    knobs = check_knobs(OmegaConf.to_container(evaluator.cfg.search.knobs, resolve=True), evaluator.knob)
    trials = check_integer("search.trials", int(evaluator.cfg.search.trials), 1)
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = optuna.create_study(
        direction="maximize", storage=_storage(optuna, evaluator.folder), study_name="search", load_if_exists=True
    )
    # a study that goes on must not draw its first trials again, as a sampler with the same seed would
    kept.sampler = optuna.samplers.TPESampler(seed=int(evaluator.cfg.seed) + len(kept.trials), n_startup_trials=4)
    done = [_point(evaluator, trial.params) for trial in kept.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
    points = done[:trials]

    def objective(trial: Any) -> float:
        points.append(_point(evaluator, {name: _suggest(trial, name, *bounds) for name, bounds in knobs.items()}))
        return score(points[-1])

    if len(points) < trials:
        kept.optimize(objective, n_trials=trials - len(points))
    return _confirmed(evaluator, points)


def score(point: Point) -> float:
    """Return the score of a trial, higher is better; a failed one has a finite score too."""
    if point.feasible:
        return point.sparsity
    missing = point.needed - point.accuracy if point.accuracy is not None else 1.0
    return point.sparsity - 10 * max(0.0, missing if math.isfinite(missing) else 1.0) - 1


def check_knobs(knobs: Any, knob: str) -> dict[str, tuple[float, float]]:
    """Return the bounds of every knob.

    Args:
        knobs: {key of the configuration: [low, high]}.
        knob: "sparsity" or "budget", which must be among them.
    Raises:
        ValueError: something else.
    """
    found = {}
    for name, bounds in (knobs or {}).items():
        if (
            not isinstance(bounds, list)
            or len(bounds) != 2
            or not all(map(is_number, bounds))
            or bounds[0] >= bounds[1]
        ):
            raise ValueError(f"`search.knobs` must hold [low, high] with low < high, got {bounds!r} for {name!r}.")
        found[str(name)] = (bounds[0], bounds[1])
    if f"callbacks.pruning.{knob}" not in found:
        raise ValueError(
            f"`search.knobs` must hold callbacks.pruning.{knob}, which the study maximizes, got {', '.join(found) or 'none'}."
        )
    return found


def _point(evaluator: Evaluator, settings: dict[str, Any], role: str = "search") -> Point:
    value = float(settings[f"callbacks.pruning.{evaluator.knob}"])
    return evaluator.evaluate(settings, value if evaluator.knob == "sparsity" else 1 - value, role)


def _suggest(trial: Any, name: str, low: float, high: float) -> float:
    """Whole numbers stay whole; a range over more than a decade is searched by its logarithm."""
    if isinstance(low, int) and isinstance(high, int):
        return int(trial.suggest_int(name, low, high))
    return float(trial.suggest_float(name, low, high, log=low > 0 and high / low > 10))


def _confirmed(evaluator: Evaluator, points: list[Point]) -> SearchResult:
    """The best feasible trial whose second measurement holds too; two are tried."""
    feasible = sorted((point for point in points if point.feasible), key=lambda point: -point.sparsity)
    if not feasible or not bool(evaluator.cfg.search.confirm):
        return SearchResult(best=feasible[0] if feasible else None, confirmed=None, points=list(points))
    everything = list(points)
    for candidate in feasible[:2]:
        second = _point(evaluator, candidate.settings, "confirmation")
        everything.append(second)
        if second.feasible:
            return SearchResult(best=candidate, confirmed=True, points=everything)
    return SearchResult(best=feasible[2] if len(feasible) > 2 else None, confirmed=None, points=everything)


def _storage(optuna: Any, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / STUDY_FILE))
    return optuna.storages.JournalStorage(backend)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("`search.knobs` needs Optuna: pip install 'lightning-prune[search]'.") from error
    return optuna
