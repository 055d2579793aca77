"""GraSP: keep the gradient flow at initialization.

Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020, equation 8.

With g the gradient of the loss by the prunable weights w and H its Hessian, removing w_i changes the gradient norm by
about -w_i (H g)_i. Weights with the largest w * H g stay; the sign counts.

Departures from the authors' program: the module's own weights are scored (theirs are drawn anew in the linear layers);
batches come as the training loader makes them unless `samples_per_class` asks for balanced ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.batches import batch_length, join_batches, map_batch
from lightning_prune.checks import check_choice, check_integer, check_positive
from lightning_prune.context import Context, Proposal
from lightning_prune.curvature import BACKENDS, Losses, point_of, replayed_losses
from lightning_prune.methods._prospr_batches import BatchStream, check_optional, noise_seed, progress
from lightning_prune.methods._prospr_selection import InitialPruning
from lightning_prune.selection import Scope

__all__ = ["GraSP", "balanced_batch", "grasp_scores"]


def grasp_scores(losses: Losses, weights: Mapping[str, Tensor], count: int = 1) -> dict[str, Tensor]:
    """Score every weight by w * (H g): g and H of the mean loss, by these weights alone.

    Args:
        losses: L_0 .. L_{count-1}, averaged.
        weights: w by name, each of any shape S.
        count: number of losses, >= 1.
    Returns:
        signed scores by name, of shape S; the largest stay.
    Raises:
        ValueError: a loss is not finite.
    """
    slope = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(count):
        loss, grads = losses.gradient(step, weights)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss of calibration batch {step} is not finite, got {float(loss)}. Check loss and data."
            )
        slope = {name: slope[name] + grads[name] / count for name in slope}
    flow = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(count):
        product = losses.product(step, weights, slope)
        flow = {name: flow[name] + product[name] / count for name in flow}
    return {name: weights[name] * flow[name] for name in weights}


def balanced_batch(stream: BatchStream, samples_per_class: int, num_classes: int) -> Any:
    """Return a batch with the first `samples_per_class` samples of every class.

    Args:
        stream: batches whose second item holds class numbers, shape (N,), from 0 to num_classes - 1.
        samples_per_class: >= 1.
        num_classes: >= 1.
    Raises:
        ValueError: a batch holds no class numbers, or one pass over the data has too few samples of a class.
    """
    wanted = torch.full((num_classes,), samples_per_class)
    found: Any = None
    last = stream.passes + 1
    while bool(wanted.any()):
        (batch,) = stream.take(1)
        if stream.passes > last:
            lacking = ", ".join(str(int(label)) for label in wanted.nonzero())
            raise ValueError(
                f"`samples_per_class`={samples_per_class} asks for more samples of class {lacking} than one pass over "
                "the data holds. Lower it, or correct `num_classes`."
            )
        labels = _labels(batch)
        chosen = [index for index, label in enumerate(labels) if _take(wanted, label)]
        if chosen:
            part = _samples(batch, chosen)
            found = part if found is None else join_batches(found, part)
    return found


def _labels(batch: Any) -> list[int]:
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            "`samples_per_class` needs batches (inputs, class numbers of shape (N,)), got another structure. "
            "Leave it out."
        )
    return labels.tolist()


def _samples(batch: Any, indices: list[int]) -> Any:
    return map_batch(batch, lambda tensor: tensor[indices], batch_length(batch))


def _take(wanted: Tensor, label: int) -> bool:
    if not 0 <= label < len(wanted):
        raise ValueError(f"`num_classes`={len(wanted)} is too small for the class number {label}.")
    taken = bool(wanted[label] > 0)
    wanted[label] -= int(taken)
    return taken


class _Softened:
    """Divides what the module's forward returns by a temperature, and remembers whether it could."""

    def __init__(self, temperature: float) -> None:
        self.temperature, self.applied = temperature, False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
            return None
        self.applied = True
        return output / self.temperature

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[_Softened]:
        """Act on `module` inside the block."""
        handle = module.register_forward_hook(self)
        try:
            yield self
        finally:
            handle.remove()

    def notes(self) -> list[str]:
        """A sentence for the receipt if there were no logits to divide."""
        if self.applied or self.temperature == 1.0:
            return []
        why = "the loss does not use a tensor returned by the module's forward"
        return [f"`temperature`={self.temperature:g} had no effect: {why}."]


class GraSP(InitialPruning):
    """Remove the weights whose removal keeps the gradient norm highest, before training starts.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        at: when; see `OneShotPruning`.
        temperature: the module's outputs (logits) are divided by it while scoring, > 0; 1 leaves them.
        batches: batches averaged in g and in H, >= 1.
        samples_per_class: class-balanced batches with so many samples each, >= 1; None takes batches as they come.
        num_classes: number of classes, >= 1; needed with `samples_per_class`.
        batch_size: samples per batch, >= 1; None takes the training loader's batches.
        micro_batch_size: samples evaluated at a time, >= 1; None takes whole batches.
        backend: Hessian-vector products by "reverse_over_reverse" or "forward_over_reverse".
        **initial: see `InitialPruning`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "grasp"

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        temperature: float = 200.0,
        batches: int = 1,
        samples_per_class: int | None = None,
        num_classes: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        backend: str = "reverse_over_reverse",
        scope: Scope = "global",
        min_keep_per_layer: int = 1,
        shuffle_within_layer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, scope, min_keep_per_layer, shuffle_within_layer, **common)
        self.temperature = check_positive("temperature", temperature)
        self.batches = check_integer("batches", batches, 1)
        self.samples_per_class = check_optional("samples_per_class", samples_per_class)
        self.num_classes = check_optional("num_classes", num_classes)
        if (samples_per_class is None) != (num_classes is None):
            raise ValueError(
                f"`samples_per_class` and `num_classes` must be given together, got {samples_per_class!r} "
                f"and {num_classes!r}."
            )
        self.batch_size = check_optional("batch_size", batch_size)
        self.micro_batch_size = check_optional("micro_batch_size", micro_batch_size)
        self.backend = check_choice("backend", backend, BACKENDS)

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest w * H g."""
        stream = BatchStream(context.objective, self.batch_size)
        weights = {name: value for name, value in point_of(context.module).items() if name in context.weights}
        weights = {name: value * context.alive[name] for name, value in weights.items()}
        with (
            progress("GraSP", 2 * self.batches, context.show_progress) as context.objective.advance,
            replayed_losses(
                context.objective,
                noise_seed(context.generator),
                second_order=True,
                micro_batch_size=self.micro_batch_size,
                backend=self.backend,
            ) as losses,
            _Softened(self.temperature).on(context.module) as softened,
        ):
            scores = grasp_scores(losses(self._draw(stream)), weights, self.batches)
        masks, notes = self.settle(self.keep(scores, context.target, context.alive), context.alive, context.generator)
        return Proposal(masks, notes=[*notes, *softened.notes(), *stream.notes()])

    def _draw(self, stream: BatchStream) -> list[Any]:
        if self.samples_per_class is None or self.num_classes is None:
            return stream.take(self.batches)
        return [balanced_batch(stream, self.samples_per_class, self.num_classes) for _ in range(self.batches)]
