"""OneShotPruning: methods that prune at given moments of a fit and leave the rest of it to fine-tuning."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_prune.callback import PruningCallback
from lightning_prune.checks import check_fraction
from lightning_prune.fit import steps_before_epoch
from lightning_prune.schedules import Moment, Position, parse_at


class PruningAtMoments(PruningCallback):
    """Acts at the moments its constructor puts into `moments`, whatever their targets count."""

    moments: tuple[Moment, ...]

    @property
    @override
    def finished(self) -> bool:
        return self.events >= len(self.moments)

    @override
    def due(self, position: Position) -> float | None:
        reached = [moment for moment in self.moments[self.events :] if moment.reached(position)]
        return reached[-1].target if reached else None

    @override
    def mark_done(self, position: Position) -> None:
        self.events += len([moment for moment in self.moments[self.events :] if moment.reached(position)])
        self.last_step = position.step

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        for moment in [] if trainer.fast_dev_run else self.moments[self.events :]:
            if isinstance(moment.when, float) and position.progress is None:
                raise MisconfigurationException(
                    f"`at`={moment.when} is a fraction of the fit, whose length is not known (max_epochs or max_steps is "
                    "-1). Give epochs (int)."
                )
            self._check_not_beyond(trainer, moment, position)
            if position.step > 0 and not resumed and moment.is_past(position):
                raise MisconfigurationException(
                    f"`at`={moment.when!r} lies before step {position.step}, at which this fit goes on from a checkpoint "
                    "that was not pruned. Load the weights without `ckpt_path` (a fit of its own), or choose a later `at`."
                )

        if not trainer.fast_dev_run:
            self._check_order(trainer, position.total_steps)

    def _check_order(self, trainer: Trainer, total_steps: int | None) -> None:
        """Epochs and fractions of one list compare only now that the length of the fit is known."""
        steps: list[tuple[float, Moment]] = []
        for moment in self.moments[self.events :]:
            if isinstance(moment.when, float):
                first: float | None = None if total_steps is None else moment.when * total_steps
            elif isinstance(moment.when, int):
                first = steps_before_epoch(trainer, trainer.lightning_module, moment.when)
            else:
                first = 0 if moment.when == "start" else float("inf")
            if first is not None:
                steps.append((first, moment))
        for (one, before), (two, after) in pairwise(steps):
            if two < one:
                raise MisconfigurationException(
                    f"`at` must list moments in order, but in this fit {before.when!r} (step {one:g}) comes after "
                    f"{after.when!r} (step {two:g}). Sort the pairs, or use epochs or fractions alone."
                )

    def _check_not_beyond(self, trainer: Trainer, moment: Moment, position: Position) -> None:
        if not isinstance(moment.when, int) or position.total_steps is None:
            return
        first = steps_before_epoch(trainer, trainer.lightning_module, moment.when)
        if first is not None and first >= position.total_steps > 0:
            raise MisconfigurationException(
                f"`at`={moment.when} epochs lies beyond the fit, which ends after {position.total_steps} steps "
                f"(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}). Lower it, train longer, or use "
                "at='end'."
            )


class OneShotPruning(PruningAtMoments):
    """A method that prunes at given moments of a fit and leaves the rest of it to fine-tuning.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None if `at` lists pairs.
        at: "start" (before the first optimizer step), "end" (after the last), an int (that many epochs done), a float
            in (0, 1) (that fraction of the fit done), or a list of (when, sparsity) pairs.
        **common: see `PruningCallback`.
    """

    def __init__(self, sparsity: float | None = None, at: Any = "start", **common: Any) -> None:
        super().__init__(**common)
        self.moments: tuple[Moment, ...] = parse_at(at, sparsity)
        paired = not isinstance(at, (str, int, float))
        if paired and sparsity is not None:
            raise ValueError(f"`sparsity` must be left out when `at` lists (when, sparsity) pairs, got {sparsity!r}.")
        if not paired:
            check_fraction("sparsity", sparsity)
        self.sparsity = self.moments[-1].target
        self.at = at
