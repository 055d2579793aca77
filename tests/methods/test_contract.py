"""What every method promises, checked for each YAML in `conf/pruning` as it is found there."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.contract import FOLDER, NAMES, Spec, compose_pruning, read_spec, signature_of, target_kept
from integration.toys import (
    QUIET,
    STEPS,
    RandomTrace,
    Toy,
    TwoOptimizers,
    Watch,
    fit,
    kept_of,
    leaks,
    make_trainer,
    masks_of,
    optimizers,
    same,
    toy,
    toy_loader,
    toy_loss,
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import MaskManager, instantiate_callbacks, prune

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]


@pytest.fixture(params=NAMES, scope="module")
def spec(request: pytest.FixtureRequest) -> Spec:
    return read_spec(request.param)


@dataclass
class Run:
    """One two-epoch fit that many tests look at; none of them changes it."""

    module: Any
    callback: Any
    trainer: Any
    watch: Watch
    structures: list[Any]
    dense: dict[str, torch.Tensor]
    checkpoints: list[Path]  # after every step, in order


@pytest.fixture(scope="module")
def run(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, module, callback = tmp_path_factory.mktemp(spec.name), toy(), spec.build()
    watch, structure, dense = Watch(), Structure(module), weights_of(module)
    trainer = fit(module, callback, watch, structure, saver(folder), enable_checkpointing=True)
    return Run(module, callback, trainer, watch, structure.seen, dense, saved_in(folder))


def saved_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def saver(folder: Path) -> ModelCheckpoint:
    """Save after every optimizer step, keep everything."""
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


class Structure(Callback):
    """Notes what a module consists of, before and while it trains."""

    def __init__(self, module: Any) -> None:
        self.seen: list[Any] = [structure_of(module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(structure_of(pl_module))


def structure_of(module: Any) -> Any:
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    return type(module), parameters, [name for name, _ in module.named_buffers()], list(module.state_dict())


class Boom(Callback):
    """Fails in the middle of the first epoch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("the user's own error")


# the YAML and the constructor


def test_there_is_something_to_check() -> None:
    assert {"gradual_magnitude", "magnitude", "random"} <= set(NAMES)


def test_the_file_instantiates_with_its_defaults(spec: Spec) -> None:
    (callback,) = instantiate_callbacks(compose_pruning(spec.name).callbacks)
    assert type(callback) is spec.kind


def test_the_keys_equal_the_constructor_signature(spec: Spec) -> None:
    assert set(spec.arguments) == set(signature_of(spec.kind))


def test_the_values_equal_the_constructor_defaults(spec: Spec) -> None:
    """Only a target may have a value in the YAML and none in Python, where nobody should get it unasked."""
    targets = {"sparsity", "budget", "penalty"}
    for name, parameter in signature_of(spec.kind).items():
        default = None if parameter.default is parameter.empty else parameter.default
        if name in targets and default is None:
            continue
        default = list(default) if isinstance(default, tuple) else default
        assert (name, spec.arguments[name]) == (name, default)


def test_every_comment_in_the_file_stands_beside_an_argument(spec: Spec) -> None:
    text = FOLDER.joinpath(f"{spec.name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("#", "_"))]
    assert text.startswith("# @package callbacks.pruning\n")
    assert all(line.partition("#")[2].strip() for line in lines)


def test_every_argument_is_stored_under_its_own_name(spec: Spec) -> None:
    callback = spec.build()
    assert [name for name in signature_of(spec.kind) if not hasattr(callback, name)] == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_made_before_a_fit_prunes_the_same(spec: Spec, run: Run, copied: Any) -> None:
    module = toy()
    fit(module, copied(spec.build()))
    assert same(masks_of(module), masks_of(run.module))


def test_a_copy_made_after_a_fit_is_independent(run: Run) -> None:
    twin, events = copy.deepcopy(run.callback), len(run.callback.history)
    twin.reset()
    fit(toy(seed=1), twin)
    assert run.callback.events == len(run.callback.history) == events > 0
    assert twin.history is not run.callback.history


# counts


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.9])
def test_the_kept_count_is_exact(spec: Spec, sparsity: float) -> None:
    spec.needs_weight_counts()
    module, callback = toy(), spec.build(sparsity=sparsity)
    fit(module, callback)
    expected = target_kept(callback, module)
    assert sum(int(mask.sum()) for mask in masks_of(module).values()) == expected
    assert kept_of(module, masks_of(module)) == expected
    assert sum(mask.numel() for mask in masks_of(module).values()) == Toy.TOTAL


def test_the_receipt_counts_what_the_weights_hold(spec: Spec, run: Run) -> None:
    receipt, parameters = run.callback.receipt, dict(run.module.named_parameters())
    kept = {name: int((parameters[name] != 0).sum()) for name in masks_of(run.module)}
    size = sum(parameter.numel() for parameter in run.module.parameters())
    total = sum(parameters[name].numel() for name in kept)
    assert total == Toy.TOTAL or (not spec.counts_weights and total > Toy.TOTAL)  # channels take biases along
    assert (receipt.reached["kept"], receipt.reached["total"]) == (sum(kept.values()), total)
    assert receipt.reached["sparsity"] == pytest.approx(1 - sum(kept.values()) / total, abs=1e-12)
    assert receipt.reached["params"] == {"dense": size, "pruned": size - total + sum(kept.values())}
    assert {layer["name"]: layer["kept"] for layer in receipt.layers} == kept
    assert set(receipt.arguments) == set(signature_of(spec.kind))
    assert receipt.method == run.callback.method


def test_prune_without_a_trainer_reaches_the_same_count(spec: Spec) -> None:
    spec.needs_weight_counts()
    module, callback = toy(), spec.build()
    receipt = prune(module, callback, toy_loader(), loss_fn=toy_loss)
    assert kept_of(module, masks_of(module)) == target_kept(callback, module) == receipt.reached["kept"]
    assert leaks(module) == []


# enforcement


@pytest.mark.parametrize("name", sorted(set(optimizers) - {"sgd"}))
def test_pruned_weights_are_zero_after_every_step(spec: Spec, name: str) -> None:
    module, watch = toy(make_optimizer=optimizers[name]), Watch()
    if name == "muon" and getattr(spec.kind, "needs_step_scale", False):
        with pytest.raises(MisconfigurationException, match="an optimizer whose step has a known scale"):
            fit(module, spec.build(), watch)
        return
    fit(module, spec.build(), watch)
    assert watch.steps == 2 * STEPS
    assert watch.pruned_steps > 0
    assert watch.found == [] == leaks(module)


def test_pruned_weights_are_zero_after_every_step_of_sgd_and_in_every_checkpoint(run: Run) -> None:
    assert run.watch.steps == len(run.checkpoints) == 2 * STEPS
    assert run.watch.pruned_steps > 0
    assert run.watch.found == [] == leaks(run.module)
    for path in run.checkpoints:
        checkpoint = torch.load(path, weights_only=True)
        state = checkpoint["callbacks"][run.callback.state_key]
        masks = state["masks"]
        assert masks or not state["done"]  # some methods train towards their masks and commit them once
        assert [name for name, mask in masks.items() if checkpoint["state_dict"][name][~mask].any()] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_trainer_settings_let_nothing_grow_back(spec: Spec, settings: dict[str, Any]) -> None:
    module, watch, callback = toy(), Watch(), spec.build()
    trainer = fit(module, callback, watch, **settings)
    per_epoch = -(-STEPS // settings.get("accumulate_grad_batches", 1))
    assert trainer.global_step == watch.steps == 2 * per_epoch
    assert watch.found == [] == leaks(module)
    assert watch.pruned_steps > 0
    assert all(event["step"] <= trainer.global_step for event in callback.history)
    if spec.counts_weights:
        assert (
            kept_of(module, masks_of(module))
            <= target_kept(callback, module)
            == sum(int(mask.sum()) for mask in masks_of(module).values())
        )


def test_steps_that_the_gradient_scaler_skips_keep_the_zeros(spec: Spec) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
    module, watch = toy(), Watch()
    trainer = fit(module, spec.build(), watch, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    assert 0 < watch.steps < trainer.global_step == 2 * STEPS  # global_step counts skipped steps too
    assert watch.found == [] == leaks(module)
    assert watch.pruned_steps > 0


def test_manual_optimization_with_several_optimizers_keeps_the_zeros(spec: Spec) -> None:
    module, watch, callback = toy(kind=TwoOptimizers), Watch(), spec.build(loss_fn=toy_loss)
    trainer = fit(module, callback, watch)
    assert watch.steps == trainer.global_step == 2 * STEPS * 3
    assert watch.found == [] == leaks(module)
    if spec.counts_weights:
        assert kept_of(module, masks_of(module)) == target_kept(callback, module)


def test_pruned_weights_are_positive_zeros(run: Run) -> None:
    """A product with a mask leaves -0.0 behind; its random sign bits make a compressed file half as large again."""
    parameters = dict(run.module.named_parameters())
    assert [name for name, mask in masks_of(run.module).items() if parameters[name][~mask].signbit().any()] == []


def test_committing_the_same_masks_again_changes_nothing(run: Run) -> None:
    weights, masks = weights_of(run.module), masks_of(run.module)
    MaskManager.of(run.module).set_masks(masks)
    assert same(weights_of(run.module), weights)
    assert same(masks_of(run.module), masks)


# the module stays the user's module


def test_class_parameters_and_keys_never_change(run: Run) -> None:
    assert len(run.structures) == 2 * STEPS + 1
    assert run.structures == [structure_of(run.module)] * len(run.structures)


def test_checkpoints_load_strictly_both_ways(run: Run) -> None:
    pruned = torch.load(run.checkpoints[-1], weights_only=True)["state_dict"]
    fresh, masked = toy(seed=5), copy.deepcopy(run.module)
    assert str(fresh.load_state_dict(pruned, strict=True)) == "<All keys matched successfully>"
    assert leaks(fresh, masks_of(run.module)) == []
    assert str(masked.load_state_dict(run.dense, strict=True)) == "<All keys matched successfully>"


def test_sparsity_zero_is_training_without_the_callback(spec: Spec) -> None:
    spec.needs("sparsity")
    runs = []
    for callbacks in ([], [spec.build(sparsity=0.0)], [spec.build(sparsity=0.0, measure=True)]):
        module, trace = toy(dropout=0.3), RandomTrace()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a receipt says of itself is not the subject
            trainer = fit(module, *callbacks, trace, loader=toy_loader(shuffle=True))
        runs.append((weights_of(module), trainer.optimizers[0].state_dict(), trainer.callback_metrics, trace.states))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_the_same_seed_gives_the_same_masks_whatever_the_global_state(spec: Spec, run: Run) -> None:
    module, callback = toy(), spec.build()
    torch.manual_seed(12345)
    fit(module, callback)
    assert same(masks_of(module), masks_of(run.module))


# life cycle


def test_resume_restores_masks_and_weights(spec: Spec, run: Run) -> None:
    resumed, callback = toy(seed=5), spec.build()
    fit(resumed, callback, ckpt_path=run.checkpoints[STEPS - 1])  # the end of the first epoch
    assert same(masks_of(resumed), masks_of(run.module))
    assert same(weights_of(resumed), weights_of(run.module))
    assert [strip(event) for event in callback.history] == [strip(event) for event in run.callback.history]


def strip(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "seconds"}


def test_a_second_fit_keeps_the_masks_and_prunes_no_more(spec: Spec) -> None:
    module, callback, watch = toy(), spec.build(), Watch()
    fit(module, callback)
    masks, events = masks_of(module), callback.events
    fit(module, callback, watch)
    assert same(masks_of(module), masks)
    assert callback.events == events
    assert watch.found == []
    assert watch.pruned_steps == 2 * STEPS


def test_another_model_needs_a_reset(spec: Spec) -> None:
    callback, other = spec.build(), toy(seed=1)
    fit(toy(), callback)
    before = weights_of(other)
    with pytest.raises(MisconfigurationException, match=r"has pruned another module.*reset\(\)"):
        fit(other, callback)
    assert same(weights_of(other), before)
    assert masks_of(other) == {}
    callback.reset()
    fit(other, callback)
    alone = toy(seed=1)
    fit(alone, spec.build())
    assert same(weights_of(other), weights_of(alone))


def test_a_fit_after_an_exception_goes_on(spec: Spec) -> None:
    module, callback, watch = toy(), spec.build(), Watch()
    trainer = make_trainer(callback, Boom())
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer.fit(module, toy_loader())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert not module._forward_pre_hooks
    fit(module, callback, watch)
    assert watch.found == [] == leaks(module)
    assert watch.steps == 2 * STEPS
    if spec.counts_weights:
        assert kept_of(module, masks_of(module)) == target_kept(callback, module)


def test_no_hook_stays_behind(run: Run) -> None:
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in run.trainer.optimizers)
    assert not run.module._forward_pre_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_and_nothing_changes(spec: Spec, bad: float) -> None:
    module = toy()
    with torch.no_grad():
        module.hidden.weight[3, 5] = bad
    before = weights_of(module)
    with pytest.raises(ValueError, match=r"must be finite|not finite"):
        fit(module, spec.build())
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(before.values(), module.state_dict().values(), strict=True)
    )
    assert masks_of(module) == {}
