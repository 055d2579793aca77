"""ProsPr: prune at initialization by meta-gradients through the first steps of training.

Alizadeh, Tailor, Zintgraf, van Amersfoort, Farquhar, Lane and Gal, "Prospect pruning: finding trainable weights at
initialization using meta-gradients", ICLR 2022, arXiv:2202.08132.

A multiplier c of the initial weights, w_0 = c * w_init, is followed through M steps of SGD. The score of a weight is
|dL(theta_M) / dc| = |w_init * dL(theta_M) / dw_0| at c = 1. At M = 0 this is SNIP.

Departures from the authors' program: the meta-gradient is made by a reverse sweep of Hessian-vector products instead of
a graph through all steps (equal numbers, constant memory); the first momentum buffer is differentiated unless
`detach_first_momentum`; exactly k weights stay; every layer keeps `min_keep_per_layer`; inner batches are distinct by
default; with `structured`, the channel is gated after its norm (before it, a channel in front of BatchNorm has no
first-order effect on the loss), and the norm and bias of a removed channel are masked too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_prune.channels import trace_channels
from lightning_prune.checks import check_bool, check_choice, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.curvature import BACKENDS, Losses, point_of, replayed_losses, trainable_names
from lightning_prune.fit import log_event
from lightning_prune.masks import MaskManager
from lightning_prune.methods._prospr_batches import (
    BatchStream,
    check_optional,
    noise_seed,
    progress,
)
from lightning_prune.methods._prospr_channels import GATES, ChannelUnits, norms_after
from lightning_prune.methods._prospr_selection import InitialPruning, Masks, prune_in_rounds
from lightning_prune.methods._prospr_sweep import MODES, InnerSGD, Store, meta_gradient
from lightning_prune.selection import Scope

__all__ = ["InnerSGD", "ProsPr", "Store", "meta_gradient", "prospr_scores"]


def prospr_scores(
    losses: Losses,
    start: Mapping[str, Tensor],
    sgd: InnerSGD,
    wanted: Sequence[str] | None = None,
    mode: str = "full",
) -> dict[str, Tensor]:
    """Score every weight by |w_0 * dL_M(theta_M) / dw_0|.

    Args:
        losses: L_0 .. L_{M-1} of the inner steps, then the meta-loss L_M.
        start: theta_0 by name, each of any shape S; all of it is trained.
        sgd: the inner loop of M steps.
        wanted: names to score; None scores all.
        mode: "full" or "first_order".
    Returns:
        scores >= 0 by name, of shape S.
    """
    names = list(start) if wanted is None else list(wanted)
    slopes, _ = meta_gradient(losses, start, sgd, names, mode=mode)
    return {name: (start[name] * slope).abs() for name, slope in slopes.items()}


class ProsPr(InitialPruning):
    """Remove the weights that matter least for the loss after the first steps of training, before training starts.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`. With `structured`: of
            their output channels.
        steps: inner SGD steps M, >= 0; 0 is SNIP.
        inner_lr: learning rate of the inner loop, > 0; None takes that of the module's first parameter group.
        inner_momentum: in [0, 1).
        mode: "full" takes the meta-gradient through all steps; "first_order" the gradient after them (one gradient of
            memory, no second derivatives).
        structured: prune whole channels of convolutions and linear layers.
        at: when; see `OneShotPruning`.
        inner_nesterov: Nesterov momentum in the inner loop.
        inner_weight_decay: >= 0.
        new_data: every inner step and the meta-loss take a batch of their own; False: one batch for all.
        rounds: above 1 the masked network is scored again after each step of an exponential schedule, >= 1.
        samples: independent draws of batches whose signed meta-gradients are averaged, >= 1.
        batch_size: samples per batch, >= 1; None takes the training loader's batches.
        micro_batch_size: samples evaluated at a time, >= 1, to save memory; None takes whole batches.
        backend: Hessian-vector products by "reverse_over_reverse" or "forward_over_reverse".
        trajectory_device: where the M copies of the parameters wait, such as "cpu"; None: where they are.
        detach_first_momentum: treat the first momentum buffer as a constant, as the authors' program does.
        gate: with `structured`: "output" gates a channel after its norm, "weight" before it, as the authors' program,
            "consumer" in the weights that read it.
        **initial: see `InitialPruning`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "prospr"

    def __init__(
        self,
        sparsity: float | None = None,
        steps: int = 3,
        inner_lr: float | None = 0.1,
        inner_momentum: float = 0.0,
        mode: str = "full",
        structured: bool = False,
        at: Any = "start",
        inner_nesterov: bool = False,
        inner_weight_decay: float = 0.0,
        new_data: bool = True,
        rounds: int = 1,
        samples: int = 1,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        backend: str = "reverse_over_reverse",
        trajectory_device: str | None = None,
        detach_first_momentum: bool = False,
        gate: str = "output",
        scope: Scope = "global",
        min_keep_per_layer: int = 1,
        shuffle_within_layer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, scope, min_keep_per_layer, shuffle_within_layer, **common)
        self.steps, self.inner_lr, self.inner_momentum = steps, inner_lr, inner_momentum
        self.inner_nesterov, self.inner_weight_decay = inner_nesterov, inner_weight_decay
        self.detach_first_momentum = detach_first_momentum
        self._inner(1.0 if inner_lr is None else inner_lr)
        self.mode = check_choice("mode", mode, MODES)
        self.structured = check_bool("structured", structured)
        self.new_data = check_bool("new_data", new_data)
        self.rounds = check_integer("rounds", rounds, 1)
        self.samples = check_integer("samples", samples, 1)
        self.batch_size = check_optional("batch_size", batch_size)
        self.micro_batch_size = check_optional("micro_batch_size", micro_batch_size)
        self.backend = check_choice("backend", backend, BACKENDS)
        self.trajectory_device = None if trajectory_device is None else str(trajectory_device)
        self.gate = check_choice("gate", gate, GATES)

    @property
    @override
    def requested(self) -> dict[str, Any]:
        """With `structured`, sparsity counts channels: the receipt states it as the share that may remain."""
        return {"budget": 1.0 - self.sparsity, "budget_type": "channels"} if self.structured else super().requested

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest |w * meta-gradient|, in as many rounds as asked."""
        sgd = self._inner(self._rate(context))
        work = self.rounds * self.samples * (2 * sgd.steps + 1 if self.mode == "full" else sgd.steps + 1)
        with (
            progress("ProsPr", work, context.show_progress) as context.objective.advance,
            replayed_losses(
                context.objective,
                noise_seed(context.generator),
                second_order=self.mode == "full" and sgd.steps > 0,
                micro_batch_size=self.micro_batch_size,
                backend=self.backend,
            ) as losses,
        ):
            stream = BatchStream(context.objective, self.batch_size)
            units = self._channels(context, losses) if self.structured else _WeightUnits(context.alive)
            search = _Search(self, context, sgd, losses, stream)

            def score(kept: Masks) -> Masks:
                return units.scores(search.signed(units.wanted, units.expand(kept)))

            minimum = max(1, self.min_keep_per_layer) if self.structured else self.min_keep_per_layer
            kept = prune_in_rounds(score, partial(self.keep, minimum=minimum), units.alive, context.target, self.rounds)
        if context.objective.trainer is not None:
            log_event(context.objective.trainer, search.logged())
        kept, notes = self.settle(kept, units.alive, context.generator)
        return Proposal(units.expand(kept), notes=[*notes, *units.notes(kept), *stream.notes(), search.note()])

    def _inner(self, rate: float) -> InnerSGD:
        return InnerSGD(
            self.steps,
            rate,
            self.inner_momentum,
            self.inner_nesterov,
            self.inner_weight_decay,
            self.detach_first_momentum,
        )

    def _rate(self, context: Context) -> float:
        """The inner learning rate; the module's own where none is given."""
        if self.inner_lr is not None:
            return self.inner_lr
        optimizers = getattr(context.objective.trainer, "optimizers", None)
        if not optimizers:
            raise ValueError("`inner_lr` must be a number where no Trainer has an optimizer to take it from, got None.")
        rate = float(optimizers[0].param_groups[0]["lr"])
        if rate <= 0:
            raise ValueError(
                f"`inner_lr`=None takes the learning rate of the first parameter group, which is {rate:g} now "
                "(a warm-up?). Give a number."
            )
        return rate

    def _channels(self, context: Context, losses: Callable[[Sequence[Any]], Losses]) -> ChannelUnits:
        """The channels of the selected weights; the first calibration batch shows how the module is run."""
        batch = BatchStream(context.objective, self.batch_size).take(1)
        leaves = {name: value.requires_grad_() for name, value in point_of(context.module).items()}
        norms = norms_after(losses(batch).parts(0)[0](leaves), leaves)
        groups = trace_channels(context)
        return ChannelUnits(context.module, groups, norms, self.gate, context.alive)


class _WeightUnits:
    """Single weights as what a ranking keeps or removes."""

    def __init__(self, alive: Mapping[str, Tensor]) -> None:
        self.alive, self.wanted = alive, list(alive)

    def scores(self, signed: Mapping[str, Tensor]) -> Masks:
        """|theta_0 * meta-gradient| of every weight."""
        return {name: value.abs() for name, value in signed.items()}

    def expand(self, kept: Masks) -> Masks:
        """The masks themselves."""
        return kept

    def notes(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Nothing to add: the receipt counts weights by itself."""
        return []


class _Search:
    """The meta-gradients of one proposal: where the inner loop starts, what it moves, which batches it meets."""

    def __init__(
        self,
        method: ProsPr,
        context: Context,
        sgd: InnerSGD,
        losses: Callable[[Sequence[Any]], Losses],
        stream: BatchStream,
    ) -> None:
        self.method, self.sgd, self.losses, self.stream = method, sgd, losses, stream
        self.point = point_of(context.module)
        self.trained = trainable_names(context.module)
        self.masks = MaskManager.of(context.module).masks
        self.history: list[float] = []

    def signed(self, wanted: Sequence[str], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """theta_0 * dL_M / dtheta_0 of the masked network, averaged over the draws of batches."""
        masks = {**self.masks, **masks}
        names = dict.fromkeys([*self.trained, *wanted])
        start = {name: self.point[name] * masks[name] if name in masks else self.point[name] for name in names}
        moving = {name: masks.get(name) for name in self.trained}
        total: dict[str, Tensor] = {}
        for _ in range(self.method.samples):
            losses, store = self.losses(self._batches()), Store(self.method.trajectory_device)
            slopes, self.history = meta_gradient(losses, start, self.sgd, wanted, moving, self.method.mode, store)
            total = {name: slope + total[name] if total else slope for name, slope in slopes.items()}
        return {name: start[name] * value / self.method.samples for name, value in total.items()}

    def _batches(self) -> list[Any]:
        """B_0 .. B_M: distinct, or one for all."""
        count = self.sgd.steps + 1
        return self.stream.take(count) if self.method.new_data else self.stream.take(1) * count

    def logged(self) -> dict[str, float]:
        """The losses of the last inner loop, for the loggers."""
        steps = {f"prune/inner_loss_{step}": value for step, value in enumerate(self.history[:-1])}
        return {**steps, "prune/meta_loss": self.history[-1]}

    def note(self) -> str:
        """The losses of the last inner loop in one sentence."""
        steps = ", ".join(f"{value:.4g}" for value in self.history[:-1])
        before = f"Inner losses {steps}; " if steps else ""
        return f"{before}meta-loss {self.history[-1]:.4g} with inner_lr {self.sgd.lr:g}."
