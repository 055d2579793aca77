"""SwitchWatch: says when half-space steps begin only after the learning rate has decayed, which leaves them little to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

DECAYED = 0.75  # of the highest rate so far; a cosine has fallen to 0.85 of it after a quarter of its length

__all__ = ["SwitchWatch"]


class SwitchWatch:
    """Compares the learning rates at the switch with the highest ones before it, and warns once.

    Rates are looked at twice: ahead, by running the schedulers, and at the switch itself, as some follow no scheduler.
    A warm-up raises the highest rate and is no decay.

    Args:
        step: of the switch, in optimizer steps.
        peaks: highest rate so far of every param group, by index of its optimizer; from a checkpoint.
        said: whether it has warned.
    """

    def __init__(self, step: int = 0, peaks: Mapping[int, Sequence[float]] | None = None, said: bool = False) -> None:
        self.step, self.said = step, said
        self.peaks = {int(index): [float(peak) for peak in found] for index, found in (peaks or {}).items()}

    def foresee(self, rates: Sequence[Sequence[float]]) -> None:
        """Look at the rates of every param group of an optimizer from now on; the last ones are those at the switch."""
        for found in rates:
            if found:
                self._compare(max(found), found[-1])

    def see(self, index: int, optimizer: Optimizer, step: int) -> None:
        """Look at the rates of the step just taken, of the optimizer with this index."""
        if step > self.step or self.said:
            return
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        before = self.peaks.get(index, rates)
        self.peaks[index] = [max(pair) for pair in zip(before, rates, strict=False)]
        if step == self.step:
            for peak, rate in zip(self.peaks[index], rates, strict=True):
                self._compare(peak, rate)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: the arguments."""
        return {
            "step": self.step,
            "peaks": {index: list(peaks) for index, peaks in self.peaks.items()},
            "said": self.said,
        }

    def _compare(self, peak: float, rate: float) -> None:
        if self.said or rate >= DECAYED * peak:
            return
        self.said = True
        rank_zero_warn(
            f"hspg: `switch` (step {self.step}) comes after the learning rate has fallen from {peak:.4g} to {rate:.4g}. A "
            "half-space is as wide as the step, so that much less becomes zero. Lower `switch` below the first decay, or "
            "decay later."
        )
