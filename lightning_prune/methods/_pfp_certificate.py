"""What is known about a pruned network, group by group: bounds, dropped mass, and what was measured on held-out samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_prune.targets import named_tensors

__all__ = ["Certificate", "GroupCertificate", "Measured", "fingerprint"]

_WIDTH = 130


@dataclass
class GroupCertificate:
    """What is known about the error that the removal of a group's units makes, at each layer that reads them.

    All errors are relative: |z^_i - z_i| / U_i, where U_i is the sum of absolute contributions to output i. They hold layer
    by layer, for the inputs of the dense network; groups that share a reader add up.

    Attributes:
        name: of the group.
        units: eta, before pruning.
        kept: units left.
        mode: "abs" or "split".
        reduction: "max" or "mean" over patches.
        variant: "top", "ht", "rand" or "hybrid".
        sensitivity_sum: S, the group's effective width.
        samples: calibration samples.
        events: N, (sample, output, position, part) events that the bound covers.
        delta: probability of failure of this group's bound.
        margin: K.
        draws: m with replacement; None where nothing is drawn.
        error: eps(m) by the formula, on the calibration data; None where there is none.
        error_exact: eps by exact variance and range, on the calibration data.
        error_unseen: eps(m) with K S for S: for unseen samples, by the paper's assumption.
        rms_mean, rms_max: expected (root mean square) error, mean and largest over events.
        dropped_sum: sum of the sensitivities of removed units.
        dropped_calibration: largest dropped mass on the calibration data; the deterministic variant's exact bound there.
        dropped_holdout, dropped_holdout_q95: largest, and 95 % quantile over samples of the largest, on hold-out samples.
        violations: hold-out samples with a unit above K times its sensitivity.
        holdout: hold-out samples.
        violations_upper95: upper limit of their rate (Clopper-Pearson, 95 %).
        covered: whether a bound holds for the weights in force.
        reason: why, or why not.
        vacuous: the bound is 1 or more, so it says nothing.
    """

    name: str
    units: int
    kept: int
    mode: str
    reduction: str
    variant: str
    sensitivity_sum: float
    samples: int
    events: int
    delta: float
    margin: float
    draws: int | None = None
    error: float | None = None
    error_exact: float | None = None
    error_unseen: float | None = None
    rms_mean: float | None = None
    rms_max: float | None = None
    dropped_sum: float = 0.0
    dropped_calibration: float = 0.0
    dropped_holdout: float | None = None
    dropped_holdout_q95: float | None = None
    violations: int = 0
    holdout: int = 0
    violations_upper95: float | None = None
    covered: bool = False
    reason: str = ""
    vacuous: bool = False

    @property
    def bound(self) -> float | None:
        """The best bound on the calibration data: eps by exact variance, else by formula, else the dropped mass."""
        if self.variant == "top" or (self.draws is None and self.error_exact is None):
            return self.dropped_calibration if self.reduction == "max" else None
        return self.error if self.error_exact is None else self.error_exact

    def after_refit(self) -> None:
        """Keep what was measured, drop the bounds: the weights they spoke of are gone."""
        self.error = self.error_exact = self.error_unseen = self.rms_mean = self.rms_max = None
        self.covered, self.vacuous = False, False
        self.reason = "its readers were refit by least squares: no bound, the masses are those of the cut before"


@dataclass
class Measured:
    """What changed end to end on hold-out samples; None where it could not be measured.

    Attributes:
        samples: hold-out samples.
        loss_before, loss_after: mean loss.
        accuracy_before, accuracy_after: share of right answers, where the batch has classes.
        agreement: share of samples whose largest output is the same.
        change_mean, change_max: mean and largest |change of an output| / mean |output|.
    """

    samples: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    agreement: float | None = None
    change_mean: float | None = None
    change_max: float | None = None


@dataclass
class Certificate:
    """The certificate of one pruning event.

    Attributes:
        groups: by group, in order.
        uncovered: parameter or group -> why its units were not pruned and no bound speaks of them.
        requested: {"budget", "budget_type"} or {"epsilon"}.
        budget_reached: fraction of the requested cost (with epsilon: of the parameters) that is left.
        params, flops: {"dense", "pruned"}, once the removed units are cut out.
        error_global: the common eps of the allocation (at K S), which set the counts.
        seed: of all draws.
        promised_samples: calibration samples that delta asks for; with fewer, `error_unseen` is not promised.
        measured: change on hold-out samples.
        notes: sentences.
        fingerprint: of all parameters when the certificate was made.
        stale: weights have moved since; bounds and measurements speak of others.
    """

    groups: list[GroupCertificate] = field(default_factory=list)
    uncovered: dict[str, str] = field(default_factory=dict)
    requested: dict[str, Any] = field(default_factory=dict)
    budget_reached: float = 1.0
    params: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    error_global: float = 0.0
    seed: int = 0
    promised_samples: int = 0
    measured: Measured = field(default_factory=Measured)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    stale: bool = False

    def check(self, module: nn.Module) -> bool:
        """Return whether the module's weights are still those that were certified; otherwise the certificate is stale."""
        self.stale = self.stale or self.fingerprint != fingerprint(module)
        return not self.stale

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Build a certificate from what `to_dict` returned or a receipt holds.

        Raises:
            ValueError: a key is unknown or missing.
        """
        try:
            known = {item.name: values[item.name] for item in dataclasses.fields(cls)}
            groups = [GroupCertificate(**group) for group in known["groups"]]
            return cls(**{**known, "groups": groups, "measured": Measured(**known["measured"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`values` must hold the fields of a certificate, got something else ({error}). Give a receipt's certificate."
            ) from error

    def table(self) -> Table:
        """Return a table of all groups, with what was measured below it."""
        table = Table(title=self._title(), caption="\n".join(self.sentences()), caption_justify="left")
        for column in (
            "group",
            "kept",
            "S",
            "draws",
            "eps",
            "eps exact",
            "dropped",
            "hold-out",
            "violations",
            "covered",
        ):
            table.add_column(column, justify="left" if column in ("group", "covered") else "right")
        for group in self.groups:
            table.add_row(
                group.name, f"{group.kept}/{group.units}", f"{group.sensitivity_sum:.2f}",
                "-" if group.draws is None else str(group.draws), _number(group.error), _number(group.error_exact),
                _number(group.dropped_calibration), _number(group.dropped_holdout),
                f"{group.violations}/{group.holdout} (<= {_number(group.violations_upper95)})", _verdict(group),
            )  # fmt: skip
        return table

    def sentences(self) -> list[str]:
        """Return what stands below the table."""
        lines = [f"{name} is not covered: {reason}." for name, reason in self.uncovered.items()]
        reasons = dict.fromkeys(group.reason for group in self.groups if group.reason)
        lines += [f"{reason[0].upper()}{reason[1:]}." for reason in reasons]
        return [*lines, *self.notes, *_measured(self.measured)]

    def __str__(self) -> str:
        """The table as text."""
        console = Console(file=StringIO(), width=_WIDTH)
        console.print(self.table())
        return str(console.file.getvalue()).rstrip()

    def _title(self) -> str:
        asked = ", ".join(f"{key} {value}" for key, value in self.requested.items())
        stale = " STALE: weights have moved since." if self.stale else ""
        return f"Certificate: asked {asked}, {self.budget_reached:.4f} left.{stale}"


def fingerprint(module: nn.Module) -> str:
    """Return a hash of all parameters, which changes as soon as one of them moves; the sign of a zero does not count."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(named_tensors(module).items()):
        digest.update(name.encode())
        value = parameter.detach().to("cpu", torch.float64 if parameter.dtype == torch.float64 else torch.float32)
        digest.update((value + 0.0).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _verdict(group: GroupCertificate) -> str:
    if not group.covered:
        return "no"
    return "yes, vacuous" if group.vacuous else "yes"


def _measured(measured: Measured) -> list[str]:
    if not measured.samples:
        return ["No hold-out sample was left to measure the change on."]
    pairs = (
        ("loss", measured.loss_before, measured.loss_after),
        ("accuracy", measured.accuracy_before, measured.accuracy_after),
    )
    parts = [f"{name} {before:.4f} -> {after:.4f}" for name, before, after in pairs if None not in (before, after)]
    if measured.change_mean is not None:
        parts.append(
            f"outputs moved by {measured.change_mean:.3f} (mean) and {measured.change_max:.3f} (largest) of their mean size"
        )
    if measured.agreement is not None:
        parts.append(f"{measured.agreement:.1%} of the answers are the same")
    return [f"Measured on {measured.samples} hold-out samples: {'; '.join(parts)}."]
