"""What the sparse proximal methods tell the loggers at the end of periods and epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_distributed import ddp
from integration.toys import (
    QUIET,
    ResumableLoader,
    Toy,
    TwoOptimizers,
    fit,
    same,
    toy,
    toy_loader,
    toy_loss,
    weights_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from prox_cases import Lines

from lightning_prune import DHSPG, HESSO, HSPG, OBProxSGD, ProxSGD

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.filterwarnings("ignore:.*use of fork"),
]
FORMS: dict[str, Any] = {
    "weights": lambda **more: ProxSGD("auto", measure=False, **more),
    "channels": lambda **more: ProxSGD("auto", structured=True, measure=False, **more),
    "orthant": lambda **more: OBProxSGD("auto", measure=False, **more),
    "half-space": lambda **more: HSPG(penalty="auto", measure=False, **more),
    "target": lambda **more: HSPG(0.5, periods=2, measure=False, **more),
    "hesso": lambda **more: HESSO(0.5, periods=2, measure=False, **more),
    "dhspg": lambda **more: DHSPG(0.5, penalty="auto", measure=False, **more),
}


def support_lines(logger: Any) -> list[dict[str, float]]:
    return [line for line in logger.lines if "prune/zeros" in line]


@pytest.mark.parametrize("form", FORMS)
def test_zeros_are_logged_by_block_until_they_are_masks(form: str) -> None:
    module, logger = toy(), Lines()
    fit(module, FORMS[form](begin=2, end=8), logger=logger)
    lines = support_lines(logger)
    unit = "weight" if form in ("weights", "orthant") else "group"
    names = {"conv.weight", "hidden.weight", "head.weight"} if unit == "weight" else {"conv", "hidden"}
    total = Toy.TOTAL if unit == "weight" else 16
    assert [line["step"] for line in lines] == ([5, 6, 8] if form in ("target", "hesso") else [6, 8])
    for line in lines:
        assert {key.removeprefix("prune/zeros/") for key in line if "zeros/" in key} == names
        assert line["prune/zeros"] == sum(line[f"prune/zeros/{name}"] for name in names)
        assert line[f"prune/{unit}_sparsity"] == pytest.approx(line["prune/zeros"] / total)
    assert sum(line["prune/new_zeros"] for line in lines) == lines[-1]["prune/zeros"] > 0
    weights = (module.conv.weight, module.hidden.weight, module.head.weight)
    zero = [int((w.detach() == 0).sum()) for w in weights]
    rows = [int((~(w.detach() != 0).flatten(1).any(1)).sum()) for w in weights[:2]]
    assert lines[-1]["prune/zeros"] == (sum(zero) if unit == "weight" else sum(rows))


@pytest.mark.parametrize("form", ["weights", "channels", "half-space", "target"])
def test_the_objective_is_loss_plus_penalty_in_eval_mode_on_calibration_batches(form: str) -> None:
    module, logger = toy(dropout=0.5), Lines()
    callback = FORMS[form](end=1.0, objective_batches=6, calibration_dataloader=toy_loader())
    fit(module, callback, logger=logger)
    last = support_lines(logger)[-1]
    module.eval()
    with torch.no_grad():
        loss = float(torch.stack([module.loss(batch) for batch in toy_loader()]).mean())
        sizes = [float(w.abs().sum()) for w in (module.conv.weight, module.hidden.weight, module.head.weight)]
    if form == "weights":
        assert last["prune/objective"] == pytest.approx(loss + last["prune/penalty"] * sum(sizes), rel=1e-5)
    elif form == "target":
        assert last["prune/objective"] == pytest.approx(loss, rel=1e-5)
        assert "prune/penalty" not in last
    else:
        assert last["prune/objective"] == pytest.approx(loss + last["prune/penalty"] * group_norms(module), rel=1e-5)


def group_norms(module: Toy) -> float:
    """sum_g w_g ||x_g|| with w_g = sqrt |g| over its mean: 4 channels of 12 entries, 12 units of 65."""
    conv, norm, hidden = module.conv, module.norm, module.hidden
    channels = [conv.weight.flatten(1), conv.bias[:, None], norm.weight[:, None], norm.bias[:, None]]
    units = torch.cat([hidden.weight, hidden.bias[:, None]], dim=1).detach().norm(dim=1).sum()
    mean = (4 * 12**0.5 + 12 * 65**0.5) / 16
    return float((12**0.5 * torch.cat(channels, dim=1).detach().norm(dim=1).sum() + 65**0.5 * units) / mean)


@pytest.mark.parametrize("form", FORMS)
def test_a_logger_changes_nothing_in_training(form: str) -> None:
    runs = []
    for logger in (False, Lines()):
        module = toy(dropout=0.2)
        trainer = fit(module, FORMS[form](end=8), loader=toy_loader(shuffle=True), logger=logger)
        runs.append((weights_of(module), trainer.optimizers[0].state_dict(), module.training))
    assert same(runs[0], runs[1])


class Counting(Toy):
    """Counts how often its loss is asked for outside of training."""

    asked = 0

    def loss(self, batch: Any) -> Any:
        type(self).asked += not self.training
        return super().loss(batch)


@pytest.mark.parametrize(("batches", "logged"), [(0, False), (2, True)])
def test_the_objective_can_be_left_out(batches: int, logged: bool) -> None:
    logger, Counting.asked = Lines(), 0
    fit(toy(kind=Counting), FORMS["weights"](end=8, objective_batches=batches), logger=logger)
    lines = support_lines(logger)
    assert ["prune/objective" in line for line in lines] == [logged] * 2
    assert Counting.asked == batches * len(lines)


def test_without_a_logger_nothing_is_evaluated() -> None:
    Counting.asked = 0
    fit(toy(kind=Counting), FORMS["weights"](end=8))
    assert Counting.asked == 0


def test_a_module_without_a_loss_logs_its_zeros_alone() -> None:
    logger = Lines()
    fit(toy(kind=TwoOptimizers), FORMS["weights"](end=6), logger=logger)
    lines = support_lines(logger)
    assert lines
    assert all("prune/objective" not in line and "prune/penalty" in line for line in lines)
    logger = Lines()
    fit(toy(kind=TwoOptimizers), FORMS["weights"](end=6, loss_fn=toy_loss), logger=logger)
    assert all("prune/objective" in line for line in support_lines(logger))


class Awkward(Toy):
    """Its loss works in training alone."""

    def loss(self, batch: Any) -> Any:
        if not self.training:
            raise RuntimeError("not now")
        return super().loss(batch)


def test_an_objective_that_fails_is_warned_about_once_and_training_goes_on() -> None:
    logger, module = Lines(), toy(kind=Awkward)
    with pytest.warns(UserWarning, match=r"`prune/objective` is not logged \(RuntimeError: not now\)") as caught:
        fit(module, FORMS["weights"](end=8), logger=logger)
    assert sum("is not logged" in str(warning.message) for warning in caught) == 1
    assert len(support_lines(logger)) == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_fit_logs_what_the_whole_one_does(form: str, tmp_path: Path) -> None:
    def run(**settings: Any) -> list[dict[str, float]]:
        logger, saver = Lines(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callback = FORMS[form](begin=1, end=8, calibration_dataloader=toy_loader())
        callbacks = (callback, saver)
        fit(toy(), *callbacks, loader=ResumableLoader(), logger=logger, enable_checkpointing=True, **settings)
        return support_lines(logger)

    whole = run()
    assert run(ckpt_path=tmp_path / "step=7.ckpt") == [line for line in whole if line["step"] > 7]


class ToFile:
    """A logger that writes what each rank is given."""

    def __new__(cls, folder: Path) -> Any:
        logger = Lines()

        def log_metrics(metrics: Any, step: int | None = None) -> None:
            rank = torch.distributed.get_rank()
            with (folder / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps({key: value for key, value in metrics.items() if "prune" in key}) + "\n")

        logger.log_metrics = log_metrics
        return logger


@pytest.mark.parametrize("form", ["half-space", "target", "dhspg"])
def test_both_ranks_log_the_same_numbers(form: str, tmp_path: Path) -> None:
    ddp(tmp_path, FORMS[form](begin=1, end=5), logger=ToFile(tmp_path))
    one, two = ((tmp_path / f"{rank}.jsonl").read_text() for rank in range(2))
    assert one == two
    assert "prune/objective" in one


def test_what_a_penalty_on_candidates_can_reach_is_logged_once() -> None:
    logger = Lines()
    fit(toy(), DHSPG(0.5, begin=2, end=8, measure=False), logger=logger)
    (line,) = (line for line in logger.lines if "prune/shrink_budget" in line)
    assert line["step"] == 2
    assert line["prune/penalty"] == 1e-3
    assert line["prune/shrink_budget"] == pytest.approx(1e-3 * (6 * 0.05 + 0.05 / 0.1))
    assert line["prune/reachable"] == 0.0


@pytest.mark.parametrize("bad", [-1, 1.5, None])
def test_a_number_of_batches_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="`objective_batches` must be an integer >= 0"):
        ProxSGD(0.1, objective_batches=bad)
