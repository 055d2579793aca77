"""The family around a Trainer: supports that only grow, exact counts, no-ops and resumes, each for every form."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hspg_cases import FORMS, GROUPS, NO_REVIVAL, TARGETS, Zeros
from integration.toys import (
    QUIET,
    ResumableLoader,
    fit,
    leaks,
    masks_of,
    optimizers,
    same,
    toy,
    toy_loader,
    weights_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_prune import DHSPG, HESSO, HSPG, OBProxSGD, ProxSGD

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.filterwarnings("ignore:.*training ended before its last planned step"),  # steps that a scaler skipped
]


def sgd(**settings: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, **settings)


def scaled() -> dict[str, Any]:
    """A gradient scaler whose first steps overflow and are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)], "max_epochs": 5}


SETTINGS: dict[str, tuple[Any, Any]] = {
    "momentum": (sgd(momentum=0.9), dict),
    "nesterov": (sgd(momentum=0.9, nesterov=True), dict),
    "coupled decay": (sgd(momentum=0.9, weight_decay=0.05), dict),
    "decoupled decay": (optimizers["adamw"], dict),
    "clipping": (sgd(momentum=0.9), lambda: {"gradient_clip_val": 0.1}),
    "accumulation": (sgd(momentum=0.9), lambda: {"accumulate_grad_batches": 2, "max_epochs": 4}),
    "skipped steps": (sgd(momentum=0.9), scaled),
}


@pytest.mark.parametrize("form", NO_REVIVAL)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_zero_revives_after_the_switch_and_the_frozen_support_stays(form: str, setting: str) -> None:
    make, settings = SETTINGS[setting]
    module, callback = toy(make_optimizer=make), FORMS[form](end=8)
    zeros = Zeros(callback)
    fit(module, callback, zeros, **settings())
    after = [seen for seen, (step, _, _) in zip(zeros.seen, zeros.clock, strict=True) if step > 4]
    assert all(not (one & ~two).any() for one, two in pairwise(after))
    frozen = [seen for seen, (_, finished, _) in zip(zeros.seen, zeros.clock, strict=True) if finished]
    assert len(frozen) > 2
    assert all(torch.equal(seen, frozen[0]) for seen in frozen)
    assert int(frozen[0].sum()) > 0
    assert leaks(module) == []


@pytest.mark.parametrize("periods", [1, 5])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("form", ["hspg", "hesso"])
def test_the_count_is_exact_at_the_deadline_and_at_the_end(form: str, sparsity: float, periods: int) -> None:
    callback = TARGETS[form](sparsity, begin=1, end=8, periods=periods)
    zeros = Zeros(callback)
    fit(toy(), callback, zeros)
    left = GROUPS - math.floor(sparsity * GROUPS + 1e-9)
    assert callback.history[-1]["step"] == 8
    assert all(sum(widths) == left for widths in zeros.widths[7:])
    assert all(sum(widths) >= left for widths in zeros.widths)
    assert min(zeros.widths[-1]) >= 1


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.7, 0.9])
def test_dhspg_is_never_below_its_count_and_meets_it(sparsity: float) -> None:
    zeros = Zeros()
    fit(toy(), DHSPG(sparsity, penalty="auto", begin=1, end=8, measure=False), zeros)
    left = GROUPS - math.floor(sparsity * GROUPS + 1e-9)
    assert all(sum(widths) >= left for widths in zeros.widths)
    assert all(sum(widths) == left for widths in zeros.widths[7:])
    assert min(zeros.widths[-1]) >= 1


@pytest.mark.parametrize("kind", [HESSO, DHSPG, HSPG])
def test_a_target_beyond_the_caps_is_refused_with_the_layers_and_what_can_be_reached(kind: Any) -> None:
    module = toy()
    before = weights_of(module)
    with pytest.raises(
        ValueError, match=r"asks for 14 of 16 .*\(conv 2 of 4, hidden 6 of 12\): 0\.5000 can be reached"
    ):
        fit(module, kind(0.9, max_ratio=0.5, measure=False))
    assert same(weights_of(module), before)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: HSPG(0.0, measure=False),
        lambda: HESSO(0.0, measure=False),
        lambda: DHSPG(0.0, measure=False),
        lambda: HSPG(penalty=0.0, switch=2, eps=0.9, measure=False),
        lambda: HSPG(penalty=0.0, switch=2, trial="subgradient", measure=False),
        lambda: OBProxSGD(0.0, prox_steps=2, measure=False),
        lambda: ProxSGD(0.0, structured=True, measure=False),
        lambda: ProxSGD(0.0, measure=False),
    ],
)
def test_a_configuration_that_does_nothing_is_the_plain_run_bit_for_bit(build: Any, kind: str) -> None:
    runs = []
    for callbacks in ([], [build()]):
        module = toy(make_optimizer=optimizers[kind], dropout=0.2)
        trainer = fit(module, *callbacks, loader=toy_loader(shuffle=True), accumulate_grad_batches=2)
        runs.append((weights_of(module), trainer.optimizers[0].state_dict()))
    assert same(runs[0], runs[1])


@pytest.mark.parametrize("form", FORMS)
def test_the_clock_is_the_global_step_and_accumulated_batches_are_one_step(form: str) -> None:
    callback = FORMS[form](begin=1, end=5)
    zeros, acts = Zeros(callback), []
    make = callback.make_engine

    def noting(*args: Any) -> Any:
        engine = make(*args)
        after = engine.after
        engine.after = lambda part, step: (acts.append(step), after(part, step))
        return engine

    callback.make_engine = noting
    fit(toy(), callback, zeros, accumulate_grad_batches=4, max_epochs=3)
    assert acts == [0, 1, 2, 3, 4]  # of six steps, four batches or the two left over in an epoch each
    running = [(own, step) for own, finished, step in zeros.clock if not finished]
    assert running
    assert all(own == step for own, step in running)


@pytest.mark.parametrize("form", FORMS)
def test_skipped_steps_change_neither_weights_nor_clock(form: str) -> None:
    callback = FORMS[form](begin=0 if "prox" in form or "orthant" in form else 1, end=8)
    module, zeros = toy(), Zeros(callback)
    before, kept = weights_of(module), []
    zeros.on_train_batch_start = lambda trainer, pl_module, *args: kept.append(  # type: ignore[method-assign]
        {name: value for name, value in weights_of(pl_module).items() if "running" not in name and "num" not in name}
    )
    fit(module, callback, zeros, **scaled())
    skipped = [index for index, (own, _, step) in enumerate(zeros.clock) if own == 0 and step > 0]
    assert skipped
    assert all(same(kept[index + 1], {name: before[name] for name in kept[index]}) for index in skipped)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, "sgd") for form in FORMS),
        ("hspg", "adamw"),
        ("dhspg", "adamw"),
        ("prox trial", "adamw"),
        ("orthant", "adamw"),
    ],
)
def test_resume_is_bitwise_in_every_phase(form: str, name: str, tmp_path: Path) -> None:
    """Before and as the method begins, at the switch, in its later stages and periods, at the freeze and after it."""

    def run(**settings: Any) -> Any:
        module = toy(make_optimizer=optimizers[name])
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        periods = {"periods": 3} if form in ("hspg", "hesso", "budget") else {}
        callback = FORMS[form](begin=2, end=8, **periods)
        trainer = fit(module, callback, saver, loader=ResumableLoader(), enable_checkpointing=True, **settings)
        return weights_of(module), masks_of(module), trainer.optimizers[0].state_dict()

    whole = run()
    for step in (1, 2, 4, 5, 8, 10):
        assert same(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole), step


READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("form", FORMS)
def test_no_step_waits_for_the_device(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every number that is read back stops the queue; between events none is."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("a tensor was read back within a step")

    callback = FORMS[form](begin=1, end=8)
    make, acts = callback.make_engine, []

    def guarded(*args: Any) -> Any:
        engine = make(*args)
        for hook in ("before", "after"):
            wrap(engine, hook)
        return engine

    def wrap(engine: Any, hook: str) -> None:
        act = getattr(engine, hook)

        def watched(part: Any, step: int) -> None:
            with monkeypatch.context() as patch:
                for read in READS:
                    patch.setattr(torch.Tensor, read, refuse)
                act(part, step)
            acts.append(hook)

        setattr(engine, hook, watched)

    callback.make_engine = guarded
    fit(toy(make_optimizer=optimizers[name]), callback)
    assert acts == ["before", "after"] * 8
