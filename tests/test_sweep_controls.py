"""What a job of a sweep is compared with, and what a sparsity means for methods that remove channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from test_sweep_tables import run

from lightning_prune import Magnitude, MaskManager, _sweep_jobs, prune
from lightning_prune._sweep_controls import CONTROLS, controls_for
from lightning_prune._sweep_jobs import CONTROLS_FOLDER, run_job
from lightning_prune._sweep_knob import pruner_of, swept_methods, with_one_cost
from lightning_prune._sweep_read import collect
from lightning_prune._sweep_tables import cells_of, controls_of, markdown
from lightning_prune.receipt import Receipt, layer_counts, reached_counts

SPARSITY = "callbacks.pruning.sparsity=0.9"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        return compose("prune", overrides=list(overrides))


def finished_job(folder: Path, method: str, requested: dict[str, Any], **reached: Any) -> Path:
    """A job's folder with a receipt and masks."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    prune(network, Magnitude(sparsity=0.9))
    folder.mkdir(parents=True, exist_ok=True)
    MaskManager.of(network).save(folder / "masks.safetensors")
    masks = MaskManager.of(network).masks
    Receipt(
        method=method, arguments={"at": "start"}, requested=requested, seed=0, reached=reached_counts(masks, **reached),
        layers=layer_counts(masks), accuracy={"finetuned": 0.5},
    ).save(folder, picture=False)  # fmt: skip
    return folder


# the common knob


@pytest.mark.parametrize("method", ["pfp", "chipnet", "hspg"])
def test_a_sparsity_of_a_sweep_is_one_budget_for_all_that_remove_channels(method: str) -> None:
    overrides = [f"pruning={method}", SPARSITY]
    pruner = pruner_of(with_one_cost(composed(*overrides), overrides))
    assert pruner is not None
    assert pruner.requested == {"budget": 0.1, "budget_type": "params"}


@pytest.mark.parametrize("method", ["chita", "prospr", "magnitude", "random", "gradual_magnitude", "dhspg"])
def test_other_methods_keep_their_sparsity(method: str) -> None:
    overrides = [f"pruning={method}", SPARSITY]
    cfg = composed(*overrides)
    assert with_one_cost(cfg, overrides) is cfg


def test_the_cost_is_a_setting_and_null_leaves_everything_to_the_method() -> None:
    overrides = ["pruning=hspg", SPARSITY]
    flops = pruner_of(with_one_cost(composed(*overrides, "sweep.budget_type=flops"), overrides))
    assert flops is not None
    assert flops.requested == {"budget": 0.1, "budget_type": "flops"}
    cfg = composed(*overrides, "sweep.budget_type=null")
    assert with_one_cost(cfg, overrides) is cfg
    with pytest.raises(ValueError, match=r"`sweep.budget_type` must be one of .*'bytes'"):
        with_one_cost(composed(*overrides, "sweep.budget_type=bytes"), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruning=hspg"],  # the file's own target
        ["pruning=pfp", SPARSITY, "callbacks.pruning.budget_type=flops"],
        ["pruning=hspg", "callbacks.pruning.sparsity=null", "callbacks.pruning.budget=0.3"],
    ],
)
def test_a_target_of_the_method_s_own_stays(overrides: list[str]) -> None:
    cfg = composed(*overrides)
    assert with_one_cost(cfg, overrides) is cfg


def test_a_wrong_sparsity_is_left_to_the_job_that_fails_of_it() -> None:
    overrides = ["pruning=hspg", "callbacks.pruning.sparsity=1.5"]
    cfg = composed(*overrides)
    assert with_one_cost(cfg, overrides) is cfg


def test_the_methods_of_a_sweep_are_read_from_its_overrides() -> None:
    assert swept_methods(["pruning=chita, random,pfp", "seed=0,1"]) == {"chita", "random", "pfp"}
    assert swept_methods(["seed=0,1"]) == set()


# which controls


def names_of(cfg: DictConfig, folder: Path, swept: tuple[str, ...] = ()) -> dict[str, float | None]:
    return {control.name: control.target for control in controls_for(cfg, folder, swept)}


def test_a_method_for_weights_has_shuffled_magnitude_and_random(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "chita", {"sparsity": 0.9})
    cfg = composed("pruning=chita", SPARSITY)
    assert names_of(cfg, job) == {"shuffled": None, "magnitude": 0.9, "random": 0.9}


def test_what_the_sweep_runs_itself_is_not_run_again(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "chita", {"sparsity": 0.9})
    cfg = composed("pruning=chita", SPARSITY)
    assert names_of(cfg, job, ("chita", "magnitude", "random")) == {"shuffled": None}


def test_magnitude_is_no_control_of_itself(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "magnitude", {"sparsity": 0.9})
    assert names_of(composed("pruning=magnitude", SPARSITY), job) == {"shuffled": None, "random": 0.9}


def test_random_masks_need_no_control(tmp_path: Path) -> None:
    assert names_of(composed("pruning=random"), finished_job(tmp_path, "random", {"sparsity": 0.9})) == {}


def test_a_penalty_is_compared_at_the_sparsity_that_it_reached(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "prox_sgd", {"penalty": 1e-3})
    found = controls_for(composed("pruning=prox_sgd", "callbacks.pruning.structured=false"), job, ("magnitude",))
    assert {control.name: control.target for control in found} == {"shuffled": None, "magnitude": None, "random": None}
    assert found[1].cfg.callbacks.pruning.sparsity == Receipt.load(job / "receipt.json").reached["sparsity"]


def test_channels_removed_by_a_penalty_are_compared_with_as_many(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "hspg", {"penalty": 1e-3}, channels={"dense": 100, "pruned": 40})
    cfg = composed("pruning=hspg", "callbacks.pruning.sparsity=null", "callbacks.pruning.penalty=auto")
    shuffled, magnitude = controls_for(cfg, job)
    assert shuffled.cfg.callbacks.pruning.structured is True
    node = magnitude.cfg.callbacks.pruning
    assert (node.budget, node.budget_type) == (0.4, "channels")


def test_controls_are_chosen_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "chita", {"sparsity": 0.9})
    assert names_of(composed("pruning=chita", SPARSITY, "sweep.controls=[random]"), job) == {"random": 0.9}
    assert names_of(composed("pruning=chita", SPARSITY, "sweep.controls=[]"), job) == {}
    with pytest.raises(ValueError, match=f"`sweep.controls` must be one of .*{CONTROLS[0]}"):
        controls_for(composed("pruning=chita", SPARSITY, "sweep.controls=[dens]"), job)


def test_a_control_prunes_at_the_moment_and_with_the_repair_of_the_method(tmp_path: Path) -> None:
    job = finished_job(tmp_path, "chita", {"sparsity": 0.9})
    cfg = composed("pruning=chita", SPARSITY, "callbacks.pruning.exclude=[conv]", "seed=3")
    random = {control.name: control for control in controls_for(cfg, job)}["random"].cfg.callbacks.pruning
    assert (random.at, random.seed, random.refit_bn, list(random.exclude)) == ("start", 3, True, ["conv"])


# shared by the jobs of a sweep


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs that write a receipt and do nothing else; returns the folders of those that ran."""
    ran: list[str] = []

    def pipeline_run(cfg: DictConfig, folder: Path) -> None:
        pruner = pruner_of(cfg)
        assert pruner is not None
        ran.append(Path(folder).name)
        finished_job(Path(folder), pruner.method, pruner.requested)

    monkeypatch.setattr(_sweep_jobs.pipeline, "run", pipeline_run)
    monkeypatch.setattr(_sweep_jobs, "shared_dense", lambda cfg, folder: folder / "dense.ckpt")
    monkeypatch.setattr(_sweep_jobs, "relocated", lambda cfg, folder: cfg)
    monkeypatch.setattr(_sweep_jobs, "pruners_by_name", lambda cfg: {"pruning": pruner_of(cfg)})
    return ran


def test_jobs_with_the_same_target_share_magnitude_and_random(tmp_path: Path, made_up: list[str]) -> None:
    for method in ("snip", "synflow"):
        overrides = [f"pruning={method}", SPARSITY, "trainer.max_epochs=2"]
        run_job(composed(*overrides), tmp_path / method, tmp_path, overrides)
    shared = {path.name for path in (tmp_path / CONTROLS_FOLDER).iterdir()}
    assert {name.rpartition("-")[0] for name in shared} == {"magnitude-0.9-seed0", "random-0.9-seed0"}
    assert made_up.count("control_shuffled") == 2
    assert len(made_up) == 2 + 2 + 2
    runs = {found.job: found for found in collect(tmp_path)}
    assert sorted(runs["snip"].shares) == sorted(f"{CONTROLS_FOLDER}/{name}" for name in shared)
    cells = cells_of(runs.values())
    for method in ("snip", "synflow"):
        cell = next(found for found in cells if found.label == method)
        assert [control.label for control in controls_of(cell, cells)] == [f"{method}, shuffled", "magnitude", "random"]
    page = markdown(list(runs.values()))
    assert page.count("(control)") == 2  # a row each, though two jobs point at them


def test_a_control_that_fails_is_named_and_tried_again(
    tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["pruning=snip", SPARSITY]
    works = _sweep_jobs.pipeline.run

    def breaks(cfg: DictConfig, folder: Path) -> None:
        if "random" in str(folder):
            raise RuntimeError("power cut")
        works(cfg, folder)

    monkeypatch.setattr(_sweep_jobs.pipeline, "run", breaks)
    run_job(composed(*overrides), tmp_path / "snip", tmp_path, overrides)
    (failed,) = [found for found in collect(tmp_path) if found.status == "failed"]
    assert (failed.method, failed.asked, failed.error) == ("random", 0.9, "RuntimeError: power cut")
    monkeypatch.setattr(_sweep_jobs.pipeline, "run", works)
    made_up.clear()
    run_job(composed(*overrides), tmp_path / "snip", tmp_path, overrides)
    assert [name.rpartition("-")[0] for name in made_up] == ["random-0.9-seed0"]


def test_the_smaller_network_is_trained_beside_its_job_and_not_among_the_dense_ones(tmp_path: Path) -> None:
    quick = [
        "data.subset=128", "dense.max_epochs=1", "trainer.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.02",
        "trainer.enable_progress_bar=false", "callbacks.progress=null", "sweep.controls=[dense]",
    ]  # fmt: skip
    overrides = ["pruning=magnitude", "callbacks.pruning.sparsity=null", "callbacks.pruning.budget=0.5"]
    cfg = _sweep_jobs.relocated(composed(*overrides, *quick), tmp_path / "job")
    run_job(cfg, tmp_path / "job", tmp_path, overrides)
    assert len(list((tmp_path / "dense").iterdir())) == 1
    runs = {found.job: found for found in collect(tmp_path)}
    assert {found.status for found in runs.values()} == {"finished"}
    control = runs["job/control_dense"]
    assert control.flops_pruned == runs["job"].flops_pruned
    assert control.flops_dense == runs["job"].flops_dense
    assert control.accuracy_finetuned is not None


def test_the_sweep_s_own_runs_take_the_place_of_controls(tmp_path: Path, made_up: list[str]) -> None:
    written = {"hydra": {"overrides": {"task": ["pruning=snip,magnitude,random", SPARSITY]}}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(written))
    run_job(composed("pruning=snip", SPARSITY), tmp_path / "snip", tmp_path, ["pruning=snip", SPARSITY])
    assert made_up == ["snip", "control_shuffled"]


# in the table


def test_a_shared_control_does_not_count_beside_the_sweep_s_own_run() -> None:
    own, shared = run("magnitude", 0.8), run("magnitude", 0.7, control="magnitude", shared=True)
    other = run("magnitude", 0.6, seed=1, control="magnitude", shared=True)
    (cell,) = cells_of([shared, other, own])
    assert [found.accuracy_finetuned for found in cell.runs] == [0.8, 0.6]


def test_a_run_is_compared_with_runs_under_its_own_settings() -> None:
    def under(method: str, accuracy: float, epochs: int) -> Any:
        label = f"{method} max_epochs={epochs}"
        return run(method, accuracy, label=label, overrides=f"pruning={method} trainer.max_epochs={epochs}")

    cells = cells_of(
        [under("chita", 0.8, 1), under("chita", 0.9, 5), under("random", 0.7, 1), under("random", 0.85, 5)]
    )
    for cell in (cell for cell in cells if cell.runs[0].method == "chita"):
        (control,) = controls_of(cell, cells)
        assert control.label.rpartition("=")[2] == cell.label.rpartition("=")[2]
