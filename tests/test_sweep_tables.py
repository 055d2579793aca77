"""Tables of a sweep from made-up runs: grouping, spread, controls, labels; names and moments of jobs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hydra_plugins.lightning_prune_plugin import job_name
from lightning_prune import Magnitude, MaskManager, prune
from lightning_prune._sweep_controls import ShuffledMasks, fresh_model, holds_shrunk, last_moment
from lightning_prune._sweep_jobs import attempt, exclusive, fingerprint, finished, read_facts, relocated
from lightning_prune._sweep_pictures import pictures, points
from lightning_prune._sweep_read import Run, collect
from lightning_prune._sweep_tables import cells_of, controls_of, csv_text, markdown, mean_and_spread, not_beaten
from lightning_prune.receipt import Receipt, layer_counts, reached_counts
from lightning_prune.shrink import save_shrunk, shrink


def run(method: str, accuracy: float, seed: int = 0, asked: float = 0.9, **values: object) -> Run:
    settings = {"label": method, **values}
    return Run(job=f"{method}{seed}", method=method, seed=seed, asked=asked, accuracy_finetuned=accuracy, **settings)


def shuffled(accuracy: float, seed: int = 0, of: str = "chita") -> Run:
    return run("shuffled", accuracy, seed, label=f"{of}, shuffled", control="shuffled", control_of=of)


def test_mean_and_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_spread([4.0]) == (4.0, None)
    assert mean_and_spread([]) == (None, None)


def test_runs_that_differ_in_the_seed_alone_share_a_cell() -> None:
    cells = cells_of([run("chita", 0.8, 0), run("chita", 0.9, 1), run("chita", 0.7, 0, asked=0.5)])
    assert [(cell.asked, len(cell.runs)) for cell in cells] == [(0.5, 1), (0.9, 2)]


def test_failed_runs_are_in_no_cell_and_in_the_list_of_failures() -> None:
    runs = [run("chita", 0.8), Run(job="b", status="failed", error="ValueError: a | b")]
    assert len(cells_of(runs)) == 1
    assert "| b | failed |  | ValueError: a \\| b |" in markdown(runs)


def test_a_method_that_beats_no_control_is_marked() -> None:
    cells = cells_of([run("chita", 0.80), run("random", 0.85), run("magnitude", 0.70), shuffled(0.80)])
    chita = next(cell for cell in cells if cell.label == "chita")
    controls = controls_of(chita, cells)
    assert [cell.label for cell in controls] == ["chita, shuffled", "random", "magnitude"]
    assert not_beaten(chita, controls) == ["chita, shuffled", "random"]
    assert "| shuffled, random |" in markdown([run for cell in cells for run in cell.runs])


def test_a_difference_within_its_standard_error_does_not_count() -> None:
    # differences 0.03 and -0.01: mean 0.01, standard error 0.02
    cells = cells_of([run("chita", 0.83, 0), run("chita", 0.79, 1), run("random", 0.80, 0), run("random", 0.80, 1)])
    assert not_beaten(cells[0], cells[1:]) == ["random"]
    cells = cells_of([run("chita", 0.83, 0), run("chita", 0.82, 1), run("random", 0.80, 0), run("random", 0.80, 1)])
    assert not_beaten(cells[0], cells[1:]) == []


def test_seeds_are_compared_with_themselves() -> None:
    cells = cells_of([run("chita", 0.5, 0), run("random", 0.9, 1)])
    assert not_beaten(cells[0], cells[1:]) == []


def test_a_control_with_fewer_seeds_says_so() -> None:
    runs = [run("chita", 0.8, 0), run("chita", 0.9, 1), shuffled(0.7, 0), run("random", 0.6, 0), run("random", 0.6, 1)]
    assert "| 70.00 (1 of 2 seeds) | 60.00 |" in markdown(runs)


def test_a_control_at_another_target_is_none() -> None:
    cells = cells_of([run("chita", 0.5, asked=0.9), run("random", 0.9, asked=0.5)])
    assert controls_of(next(cell for cell in cells if cell.label == "chita"), cells) == []


def test_budgets_and_sparsities_have_tables_of_their_own() -> None:
    page = markdown([run("chita", 0.8), run("pfp", 0.7, asked=0.5, kind="flops")])
    assert "by sparsity asked" in page
    assert "by budget of flops" in page


def test_a_penalty_chosen_by_the_method_has_a_row_too(tmp_path: Path) -> None:
    for name, requested in (("prox_sgd", {"penalty": "auto"}), ("pfp", {"epsilon": 0.2})):
        Receipt(method=name, requested=requested, reached=reached_counts({}), accuracy={"finetuned": 0.5}).save(
            tmp_path / name, picture=False
        )
    page = markdown(collect(tmp_path))
    assert "by penalty asked" in page
    assert "| auto | prox_sgd | 1 |" in page
    assert "by epsilon asked" in page
    assert "| 0.2 | pfp | 1 |" in page


def test_the_csv_has_a_row_per_run() -> None:
    lines = csv_text([run("chita", 0.8), run("random", 0.7)]).splitlines()
    assert len(lines) == 3
    assert "arguments" not in lines[0]


def test_points_are_sorted_by_cost_and_in_percent() -> None:
    cells = cells_of([run("chita", 0.8, sparsity=0.9), run("chita", 0.9, asked=0.5, sparsity=0.5)])
    assert points(cells, lambda run: run.sparsity) == [(0.5, 90.0, 0.0), (0.9, 80.0, 0.0)]


def test_nothing_to_draw_gives_no_picture() -> None:
    assert pictures([]) == {}


def saved(folder: Path, method: str, seed: int = 0, **arguments: object) -> None:
    mask = torch.arange(10) >= 9
    Receipt(
        method=method, arguments={"sparsity": 0.9, "seed": 0, **arguments}, seed=seed, requested={"sparsity": 0.9},
        reached=reached_counts({"w": mask}), layers=layer_counts({"w": mask}), accuracy={"finetuned": 0.5},
    ).save(folder, picture=False)  # fmt: skip


def test_labels_tell_runs_apart_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path / "0", "magnitude", scope="global")
    saved(tmp_path / "1", "magnitude", scope="layer")
    saved(tmp_path / "2", "random", scope="layer")
    assert [run.label for run in collect(tmp_path)] == ["magnitude scope=global", "magnitude scope=layer", "random"]


def test_a_control_belongs_to_the_run_around_it(tmp_path: Path) -> None:
    saved(tmp_path / "a", "chita", scope="global")
    saved(tmp_path / "a" / "control_shuffled", "shuffled", of="chita", scope="layer")
    saved(tmp_path / "b", "magnitude", scope="layer")
    saved(tmp_path / "a" / "control_magnitude", "magnitude", scope="global")
    runs = {run.job: run for run in collect(tmp_path)}
    assert runs["a/control_shuffled"].label == "chita, shuffled"
    assert runs["a/control_magnitude"].label == "chita, magnitude"
    assert runs["b"].label == "magnitude"
    cells = cells_of(runs.values())
    chita = next(cell for cell in cells if cell.label == "chita")
    assert [cell.label for cell in controls_of(chita, cells)] == ["chita, magnitude", "chita, shuffled"]


def test_the_dense_control_costs_a_part_of_its_owners_dense_network(tmp_path: Path) -> None:
    for folder, flops, accuracy in (
        ("a", {"dense": 100, "pruned": 40}, None),
        ("a/control_dense", {"dense": 40, "pruned": 40}, 0.7),
    ):
        Receipt(
            method="none" if accuracy else "pfp", requested={} if accuracy else {"budget": 0.4, "budget_type": "flops"},
            seed=0, reached=reached_counts({}, flops=flops),
            accuracy={"dense": accuracy} if accuracy else {"dense": 0.9, "finetuned": 0.8},
        ).save(tmp_path / folder, picture=False)  # fmt: skip
    control = next(run for run in collect(tmp_path) if run.control)
    assert (control.label, control.kind, control.asked) == ("pfp, dense at equal FLOPs", "flops", 0.4)
    assert (control.flops_pruned, control.flops_dense) == (40, 100)
    assert (control.accuracy_finetuned, control.accuracy_dense) == (0.7, 0.9)


def test_the_smaller_network_starts_untrained(tmp_path: Path) -> None:
    module = two_layers()
    prune(module, Magnitude(budget=0.5), [torch.randn(4, 8)] * 2, loss_fn=lambda net, batch: net(batch).sum())
    small = shrink(module, torch.randn(2, 8))
    save_shrunk(small, tmp_path / "model.safetensors")
    target = {"_target_": f"{__name__}.two_layers"}
    fresh = fresh_model(OmegaConf.create(target), str(tmp_path / "model.safetensors"))
    assert [tuple(p.shape) for p in fresh.parameters()] == [tuple(p.shape) for p in small.parameters()]
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in module.parameters())
    assert not torch.equal(fresh[0].weight, small[0].weight)
    assert holds_shrunk(tmp_path / "model.safetensors")


def two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def test_labels_tell_runs_apart_by_other_overrides(tmp_path: Path) -> None:
    for number, width in enumerate((8, 16)):
        saved(tmp_path / str(number), "magnitude")
        (tmp_path / str(number) / ".hydra").mkdir()
        text = f"- pruning=magnitude\n- seed=0\n- model.network.width={width}\n- trainer.max_epochs=1\n"
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(text)
    assert [run.label for run in collect(tmp_path)] == ["magnitude width=8", "magnitude width=16"]


def test_a_job_is_named_by_what_sets_it_apart() -> None:
    name = job_name("callbacks.pruning.sparsity=0.9,data.subset=200,pruning=magnitude,seed=1")
    assert name.startswith("magnitude-0.9-seed1-")
    assert name != job_name("callbacks.pruning.sparsity=0.9,data.subset=300,pruning=magnitude,seed=1")
    assert job_name("ckpt_path=a/b=c.ckpt").isalnum()


@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        ({"at": "start"}, "start"), ({"at": 3}, 3), ({"at": 0.5}, 0.5), ({"at": [["start", 0.5], [3, 0.9]]}, 3),
        ({"begin": 0.0, "end": 0.75}, 0.75), ({"begin": 0.0, "end": 1.0}, "end"), ({"end": 300}, "start"), ({}, "start"),
    ],
)  # fmt: skip
def test_the_control_comes_when_the_method_made_its_final_mask(arguments: dict, moment: object) -> None:
    assert last_moment(arguments) == moment


def test_shuffled_masks_keep_the_counts_of_the_file(tmp_path: Path) -> None:
    def network() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))

    first, second = network(), network()
    prune(first, Magnitude(sparsity=0.7))
    MaskManager.of(first).save(tmp_path / "masks.safetensors")
    prune(second, ShuffledMasks(str(tmp_path / "masks.safetensors"), of="magnitude"))
    one, two = MaskManager.of(first).masks, MaskManager.of(second).masks
    assert {name: int(mask.sum()) for name, mask in one.items()} == {
        name: int(mask.sum()) for name, mask in two.items()
    }
    assert any(bool((one[name] != two[name]).any()) for name in one)


def test_a_shuffled_mask_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ShuffledMasks(str(tmp_path / "none.safetensors"), of="magnitude")


CONFIG = OmegaConf.create({"seed": 0, "trainer": {"max_epochs": 1}, "folder": "${hydra:runtime.output_dir}/x"})


def test_a_job_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        saved(tmp_path / "job", "magnitude")

    assert attempt(CONFIG, tmp_path / "job", work)
    assert attempt(CONFIG, tmp_path / "job", work)
    assert done == [1]
    changed = OmegaConf.merge(CONFIG, {"trainer": {"max_epochs": 2}})
    assert attempt(changed, tmp_path / "job", work)  # type: ignore[arg-type]
    assert done == [1, 1]


def test_a_failure_is_recorded_and_the_stale_receipt_is_gone(tmp_path: Path) -> None:
    saved(tmp_path / "job", "magnitude")

    def work() -> None:
        raise RuntimeError("power cut")

    assert not attempt(CONFIG, tmp_path / "job", work, overrides=["seed=0"])
    facts = read_facts(tmp_path / "job")
    assert (facts["status"], facts["error"]) == ("failed", "RuntimeError: power cut")
    assert not (tmp_path / "job" / "receipt.json").exists()
    assert not finished(tmp_path / "job", fingerprint(CONFIG))


def test_an_interrupted_job_stays_unfinished(tmp_path: Path) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(CONFIG, tmp_path / "job", work)
    assert read_facts(tmp_path / "job")["status"] == "running"
    assert collect(tmp_path)[0].status == "unfinished"


def test_the_fingerprint_is_free_of_where_files_go(tmp_path: Path) -> None:
    assert fingerprint(CONFIG) == fingerprint(OmegaConf.merge(CONFIG, {"sweep": {"controls": []}}))  # type: ignore[arg-type]
    assert relocated(CONFIG, tmp_path).folder == f"{tmp_path}/x"


def test_a_file_is_held_by_one(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with exclusive(tmp_path / "lock"), (tmp_path / "lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
