"""Every optimizer leaves pruned weights at exactly 0, and what it remembers of them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    MakeOptimizer,
    Toy,
    TwoOptimizers,
    Watch,
    fit,
    leaks,
    masks_of,
    optimizers,
    same,
    sgd,
    toy,
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune import GradualMagnitude, Magnitude, MaskManager, RandomPruning

pytestmark = QUIET


class Plain(torch.optim.Optimizer):
    """A user's own optimizer: sign descent with a slow copy of the weights, which it mixes back in."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=0.01)
            slow.lerp_(parameter, 0.1)
            parameter.lerp_(slow, 0.5)
        return loss


MORE: dict[str, MakeOptimizer] = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused-adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "looped-adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": torch.optim.Adadelta,
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "own": Plain,
}
if hasattr(torch.optim, "Adafactor"):
    MORE["adafactor"] = torch.optim.Adafactor
EVERY = {**optimizers, **MORE}


@pytest.mark.parametrize("gradients", [True, False], ids=["masked-gradients", "free-gradients"])
@pytest.mark.parametrize("name", sorted(EVERY))
def test_pruned_mid_training_stays_pruned(name: str, gradients: bool) -> None:
    module, watch = toy(make_optimizer=EVERY[name]), Watch()
    fit(module, Magnitude(0.5, at=1, mask_gradients=gradients, measure=False), watch)
    assert (watch.steps, watch.pruned_steps) == (2 * STEPS, STEPS)
    assert watch.found == [] == leaks(module)


class Lookalike:
    """Not derived from torch's class; Lightning takes it all the same."""

    def __init__(self, parameters: Any) -> None:
        inner = self.inner = sgd(parameters)
        self.defaults, self.param_groups, self.state = inner.defaults, inner.param_groups, inner.state
        self.state_dict, self.load_state_dict, self.zero_grad = inner.state_dict, inner.load_state_dict, inner.zero_grad

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class HalfBuilt(torch.optim.Optimizer):
    """Derived from torch's class without calling its constructor, as older look-ahead optimizers do."""

    def __init__(self, parameters: Any) -> None:
        self.inner = sgd(parameters)
        self.defaults, self.param_groups, self.state = self.inner.defaults, self.inner.param_groups, self.inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [Lookalike, HalfBuilt])
def test_an_optimizer_without_step_hooks_is_refused_by_name(kind: Any) -> None:
    module = toy(make_optimizer=kind)
    before = weights_of(module)
    with pytest.raises(MisconfigurationException, match=kind.__name__):
        fit(module, Magnitude(0.5, measure=False))
    assert same(weights_of(module), before)
    assert masks_of(module) == {}


def test_a_module_without_an_optimizer_is_pruned_all_the_same() -> None:
    module = toy(make_optimizer=lambda parameters: None)
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        fit(module, Magnitude(0.5, at=1, measure=False))
    assert leaks(module) == []
    assert sum(int(mask.sum()) for mask in masks_of(module).values()) == Toy.TOTAL // 2


def test_a_sparse_gradient_is_masked() -> None:
    class Embedded(Toy):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.table = nn.Embedding(20, 64, sparse=True)
            self.requires_grad_(False)
            self.table.requires_grad_(True)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.hidden(self.table(images.flatten(1).argmax(1) % 20)))

    module, watch = toy(kind=Embedded, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), Watch()
    before = module.table.weight.detach().clone()
    fit(module, Magnitude(0.5, include=["table.weight"], measure=False), watch)
    assert watch.found == [] == leaks(module)
    assert not torch.equal(module.table.weight[before != 0], before[before != 0])


def state_of_pruned(trainer: Any, module: Any) -> Tensor:
    """Collect what the optimizer remembers of pruned entries, in tensors of their parameter's shape."""
    parameters, found = dict(module.named_parameters()), []
    for name, mask in masks_of(module).items():
        for optimizer in trainer.optimizers:
            for value in optimizer.state.get(parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    found.append(value[~mask].flatten())
    return torch.cat(found)


@pytest.mark.parametrize("name", ["adagrad", "adam", "adamw", "nesterov", "own", "rmsprop", "sgd"])
def test_the_optimizer_forgets_pruned_weights(name: str) -> None:
    module = toy(make_optimizer=EVERY[name])
    trainer = fit(module, Magnitude(0.5, at=1, measure=False))
    remembered = state_of_pruned(trainer, module)
    assert remembered.numel() >= Toy.TOTAL // 2
    assert not remembered.any()


def test_a_gradient_mask_alone_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: momentum moves pruned weights unless the step is followed by the mask."""
    monkeypatch.setattr(MaskManager, "apply", lambda self, optimizer=None: None)
    module, watch = toy(make_optimizer=optimizers.get("muon", sgd)), Watch()
    fit(module, Magnitude(0.5, at=1, measure=False), watch)
    assert watch.found != []


def test_kept_weights_do_not_feel_the_gradient_mask_of_elementwise_optimizers() -> None:
    results = []
    for gradients in (True, False):
        module = toy(make_optimizer=optimizers["adamw"])
        fit(module, Magnitude(0.5, at=1, mask_gradients=gradients, measure=False))
        results.append(weights_of(module))
    assert same(*results)


def test_clipping_counts_the_gradients_of_kept_weights_only() -> None:
    """Masks come before clipping: the norm is that of what is trained."""
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                norms.append(float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))))

    fit(toy(), Magnitude(0.9, measure=False, layer_floor=0.05), Norms(), gradient_clip_val=1e-2)
    assert norms == pytest.approx([1e-2] * len(norms), rel=1e-3)
    assert len(norms) == 2 * STEPS - 1


@pytest.mark.parametrize("wrapped", [True, False], ids=["lightning-optimizer", "raw-optimizer"])
def test_manual_optimization_prunes_on_time(wrapped: bool) -> None:
    """Raw optimizers bypass Lightning's hooks and step counter; the mask follows their steps all the same."""

    class Manual(TwoOptimizers):
        def optimizers(self) -> Any:  # type: ignore[override]
            return super().optimizers(use_pl_optimizer=wrapped)

    module, watch = toy(kind=Manual), Watch()
    callback = RandomPruning(at=[("start", 0.2), (0.5, 0.4), (1, 0.6)], scope="global", measure=False)
    fit(module, callback, watch)
    assert watch.steps == 2 * STEPS * 3
    assert watch.found == [] == leaks(module)
    assert [(event["step"], event["kept"]) for event in callback.history[:1]] == [(0, 672)]
    assert callback.history[-1]["kept"] == 336


def test_manual_optimization_counts_batches_for_schedules() -> None:
    module, callback = toy(kind=TwoOptimizers), GradualMagnitude(0.8, every_n_steps=1, end=1.0, measure=False)
    trainer = fit(module, callback)
    assert trainer.global_step == 3 * 2 * STEPS
    assert [event["step"] for event in callback.history] == list(range(2 * STEPS + 1))
    assert callback.history[-1]["kept"] == Toy.TOTAL - 672


class Backboned(Toy):
    """A backbone that is frozen first and enters the optimizer later."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.backbone = nn.ModuleDict({"conv": self.conv, "norm": self.norm, "hidden": self.hidden})
        del self.conv, self.norm, self.hidden

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone["norm"](self.backbone["conv"](images)).relu().flatten(1)
        return self.head(self.backbone["hidden"](features).relu())

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("at", "order"), [("start", 1), ("start", -1), (2, 1), (0.9, -1)])
def test_a_frozen_backbone_is_pruned_and_stays_so_when_it_thaws(at: Any, order: int, gradients: bool) -> None:
    module, watch = toy(kind=Backboned), Watch()
    thaw = BackboneFinetuning(1, backbone_initial_lr=0.1, lambda_func=lambda epoch: 1.0, train_bn=False)
    callbacks = [Magnitude(0.5, at=at, mask_gradients=gradients, measure=False), thaw][::order]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(module, *callbacks, watch, max_epochs=3)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert set(masks_of(module)) == {"backbone.conv.weight", "backbone.hidden.weight", "head.weight"}
    assert watch.found == [] == leaks(module)
    assert not torch.equal(before["backbone.hidden.bias"], module.backbone["hidden"].bias)  # it did thaw


@pytest.mark.parametrize("schedule", [{0: 1, 1: 4}, {0: 4, 1: 1}])
def test_changing_accumulation_moves_no_moment(schedule: dict[int, int]) -> None:
    """The number of steps to come, which Lightning estimates from the current setting, jumps at the second epoch."""
    seen: dict[str, Any] = {}
    methods: dict[str, Callable[[], Any]] = {
        "end": lambda: Magnitude(0.5, at="end", measure=False),
        "fraction": lambda: Magnitude(0.5, at=0.5, measure=False),
        "gradual": lambda: GradualMagnitude(0.5, every_n_steps=1, end=1.0, measure=False),
    }
    for name, make in methods.items():
        callback = make()
        trainer = fit(toy(), callback, GradientAccumulationScheduler(schedule))
        seen[name] = [(event["step"], event["epoch"], event["kept"]) for event in callback.history]
    last = trainer.global_step
    assert seen["end"] == [(last, seen["end"][0][1], 420)]
    assert last == 6 + 2
    assert seen["fraction"][0][0] == last // 2
    assert seen["gradual"][-1][0] == last
    assert [kept for _, _, kept in seen["gradual"]] == sorted((k for _, _, k in seen["gradual"]), reverse=True)
    assert seen["gradual"][-1][2] == 420
