"""The search of the command line: evaluations are runs of the pipeline from one dense network, kept and never repeated."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from lightning_prune import _search_report, pipeline
from lightning_prune._sweep_jobs import attempt, pruners_by_name, read_facts, relocated, shared_dense
from lightning_prune.checks import check_choice, check_fraction, is_number
from lightning_prune.files import replacing
from lightning_prune.receipt import Receipt
from lightning_prune.search import Point, SearchResult, find_highest, standard_error

EVALUATIONS = "evaluations"
SCORE_FILE = "score.json"
_CONFIRMATION_SEED = 1000  # added to the seed: another order of the data, the same dense network
_RESULT_FILES = ("receipt.json", "receipt.md", "receipt.png", "masks.safetensors", "model.safetensors", "pruned.ckpt")


def run_search(cfg: DictConfig, folder: Path, dense_folder: Path | None = None) -> float:
    """Search as `cfg.search` says, leave the best run's files in `folder`, and return its test accuracy.

    A search that was cut off goes on in the same folder: finished evaluations are read, not repeated.

    Args:
        cfg: the composed configuration, with `search.max_drop`.
        folder: where all files go.
        dense_folder: where dense networks are shared; None: `folder`.
    Returns:
        The test accuracy of the returned point; that of the dense network if no point was feasible.
    Raises:
        ValueError: a setting breaks its rule, or a metric was not logged.
        RuntimeError: the dense network could not be trained.
    """
    evaluator = Evaluator(cfg, folder, dense_folder or folder)
    if OmegaConf.select(cfg, "search.knobs"):
        from lightning_prune._search_optuna import study

        result = study(evaluator)
    else:
        settings = cfg.search
        result = find_highest(
            evaluator, float(settings.max_sparsity), int(settings.max_evaluations), float(settings.tolerance),
            bool(settings.confirm),
        )  # fmt: skip
    return _finish(evaluator, result, folder)


class Evaluator:
    """Prunes, fine-tunes and validates one target after another, each from the same dense network.

    Args:
        cfg: the composed configuration.
        folder: where the evaluations go.
        dense_folder: where dense networks are shared.
    Raises:
        ValueError: a setting breaks its rule.
    """

    def __init__(self, cfg: DictConfig, folder: Path, dense_folder: Path) -> None:
        self.cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
        self.folder = folder
        self.max_drop = check_fraction("search.max_drop", cfg.search.max_drop)
        self.split = check_choice("search.split", cfg.search.split, ("val", "test"))
        self.margin = float(cfg.search.margin)
        if not is_number(self.margin) or self.margin < 0:
            raise ValueError(f"`search.margin` must be >= 0 standard errors, got {cfg.search.margin!r}.")
        self.knob = knob_of(cfg)
        self.starts_trained = pipeline.starts_trained(cfg, list(pruners_by_name(cfg).values()))
        given = self.cfg.ckpt_path
        self.dense = str(given) if given is not None else str(shared_dense(self.cfg, dense_folder))
        score = self._dense_score()
        self.dense_accuracy, self.samples = score["accuracy"], score["samples"]
        self.dense_test_accuracy: float | None = score["test_accuracy"]
        self.floor = self.dense_accuracy - self.max_drop

    def __call__(self, sparsity: float, role: str) -> Point:
        """Evaluate a sparsity (or the budget 1 - sparsity)."""
        value = sparsity if self.knob == "sparsity" else round(1 - sparsity, 6)
        return self.evaluate({f"callbacks.pruning.{self.knob}": value}, sparsity, role)

    def evaluate(self, settings: dict[str, Any], sparsity: float, role: str = "search") -> Point:
        """Evaluate the configuration with `settings` in place."""
        cfg = self._configured(settings, role)
        name = "-".join(
            [*(f"{key.rpartition('.')[2]}{value:.6g}" for key, value in settings.items()), f"seed{cfg.seed}"]
        )
        place = self.folder / EVALUATIONS / name
        done = attempt(cfg, place, lambda: self._work(cfg, place), evaluation=role)
        point = Point(
            sparsity=sparsity, accuracy=None, needed=math.inf, feasible=False, seed=int(cfg.seed), role=role,
            folder=place.relative_to(self.folder).as_posix(), settings=dict(settings),
        )  # fmt: skip
        if not done:
            point.error = str(read_facts(place).get("error"))
            return self._told(point)
        score = json.loads((place / SCORE_FILE).read_text(encoding="utf-8"))
        point.accuracy, point.test_accuracy = score["accuracy"], score["test_accuracy"]
        point.needed = self.floor + self.margin * standard_error(score["accuracy"], self.samples)
        point.feasible = score["accuracy"] >= point.needed and self._holds_on_test(point)
        return self._told(point)

    def _holds_on_test(self, point: Point) -> bool:
        """The test set chooses no point, but one that fails there is not called feasible."""
        if point.test_accuracy is None or self.dense_test_accuracy is None:
            return True
        return point.test_accuracy >= self.dense_test_accuracy - self.max_drop

    def _told(self, point: Point) -> Point:
        verdict = point.error or f"accuracy {point.accuracy:.4f}, needed {point.needed:.4f}"
        state = "feasible" if point.feasible else "not feasible"
        rank_zero_info(f"Search: {self.knob} {self._value(point):.6g} ({point.role}): {verdict}: {state}.")
        return point

    def _value(self, point: Point) -> float:
        return point.sparsity if self.knob == "sparsity" else 1 - point.sparsity

    def _configured(self, settings: dict[str, Any], role: str) -> DictConfig:
        cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(self.cfg, resolve=False)))
        for key, value in settings.items():
            OmegaConf.update(cfg, key, value, merge=False)
        cfg.seed = int(cfg.seed) + (_CONFIRMATION_SEED if role == "confirmation" else 0)
        if self.starts_trained:
            cfg.ckpt_path = self.dense
        # of the settings of the search, a result depends on these alone
        cfg.evaluation = {"split": self.split, "metric": str(cfg.search.metric)}
        cfg.search.max_drop = None
        return cfg

    def _work(self, cfg: DictConfig, place: Path) -> None:
        pipeline.run(relocated(cfg, place), place)
        self._score(cfg, place, place / "pruned.ckpt")

    def _dense_score(self) -> dict[str, Any]:
        """Validate the dense network once."""
        place = self.folder / EVALUATIONS / "dense"
        path = place / SCORE_FILE
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = {}
        if (held.get("checkpoint"), held.get("split")) != (self.dense, self.split):
            held = self._score(self.cfg, place, Path(self.dense))
        return held

    def _score(self, cfg: DictConfig, place: Path, checkpoint: Path) -> dict[str, Any]:
        """Measure a checkpoint on the split that decides and on the test set; write it down."""
        settings = relocated(cfg, place)
        model, data = instantiate(settings.model), instantiate(settings.data)
        pipeline.load_weights(model, checkpoint)
        trainer = instantiate(
            settings.trainer, callbacks=[], enable_checkpointing=False, enable_progress_bar=False, logger=False
        )
        test = _metric(trainer.test(model, datamodule=data, verbose=False), str(cfg.metric))
        if self.split == "test":
            accuracy, loader = test, data.test_dataloader()
        else:
            name = str(cfg.search.metric)
            accuracy, loader = (
                _metric(trainer.validate(model, datamodule=data, verbose=False), name),
                data.val_dataloader(),
            )
        if accuracy is None:
            name = "metric" if self.split == "test" else "search.metric"
            raise ValueError(
                f"`{name}` must be a metric that the module logs on the {self.split} set, got "
                f"{OmegaConf.select(cfg, name)!r}. Name one that `{self.split}`uation logs, or choose another `search.split`."
            )
        held = {
            "accuracy": accuracy, "test_accuracy": test, "samples": _samples(loader), "checkpoint": str(checkpoint),
            "split": self.split,
        }  # fmt: skip
        with replacing(place / SCORE_FILE) as temporary:
            temporary.write_text(json.dumps(held), encoding="utf-8")
        return held


def knob_of(cfg: DictConfig) -> str:
    """Return which argument of the method sets how much is pruned: "budget" where one is given, else "sparsity".

    Raises:
        ValueError: the method has neither, or its targets are pairs in `at`.
    """
    node = OmegaConf.select(cfg, "callbacks.pruning") or {}
    if node.get("budget") is not None or node.get("budget_type") is not None:
        return "budget"
    if node.get("sparsity") is not None:
        return "sparsity"
    raise ValueError(
        "`search.max_drop` needs a method with a `sparsity` or a `budget`, got "
        f"{node.get('_target_', 'no pruning method')}. Choose one by pruning=... and leave `at` a single moment."
    )


def _metric(results: Any, name: str) -> float | None:
    return next((float(result[name]) for result in results if name in result), None)


def _samples(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _finish(evaluator: Evaluator, result: SearchResult, folder: Path) -> float:
    _search_report.save(evaluator, result, folder)
    if result.best is None:
        rank_zero_info("Search: the dense network stays.")
        return evaluator.dense_accuracy if evaluator.dense_test_accuracy is None else evaluator.dense_test_accuracy
    for name in _RESULT_FILES:
        source = folder / result.best.folder / name
        if source.is_file():
            with replacing(folder / name) as temporary:
                shutil.copyfile(source, temporary)
    Receipt.load(folder / "receipt.json").show()
    return math.nan if result.best.test_accuracy is None else result.best.test_accuracy
