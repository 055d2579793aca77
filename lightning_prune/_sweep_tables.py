"""Tables of a sweep: mean and spread over seeds, controls beside each method, failures by name."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_prune._sweep_read import COLUMNS, FINISHED, Run, settings_of
from lightning_prune.cost import KINDS

NO_PICTURE = "No picture was drawn: matplotlib is not installed."
_DASH = "\N{EN DASH}"
_BASELINES = ("random", "magnitude")
_BESIDE = ("shuffled", "random", "magnitude", "dense")  # columns of controls


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: see `Run.label`.
        kind: see `Run.kind`.
        asked: the target.
        runs: finished runs, by seed.
    """

    label: str
    kind: str
    asked: float | None
    runs: tuple[Run, ...]

    def values(self, quantity: Callable[[Run], float | None]) -> dict[int | None, float]:
        """Return a quantity by seed, where it is known."""
        found = {run.seed: quantity(run) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def accuracy_of(run: Run) -> float | None:
    """Return the final accuracy of a run: fine-tuned, or dense where nothing was pruned."""
    return run.accuracy_finetuned if run.accuracy_finetuned is not None else run.accuracy_dense


def cells_of(runs: Iterable[Run]) -> list[Cell]:
    """Group finished runs that differ in nothing but the seed, by kind of target, target and label."""
    groups: dict[tuple[str, float | None, str], list[Run]] = {}
    for run in runs:
        if run.status == FINISHED:
            groups.setdefault((run.kind, run.asked, run.label), []).append(run)
    cells = [Cell(label, kind, asked, _distinct(members)) for (kind, asked, label), members in groups.items()]
    return sorted(cells, key=lambda cell: (cell.kind != "sparsity", cell.kind, _level(cell), cell.label))


def mean_and_spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation; None for what the number of values does not allow."""
    held = list(values)
    return (
        statistics.fmean(held) if held else None,
        statistics.stdev(held) if len(held) > 1 else None,
    )


def not_beaten(cell: Cell, controls: Iterable[Cell]) -> list[str]:
    """Return the labels of the controls that a method does not beat.

    It beats a control if the mean of the differences of final accuracy, seed by seed, is above its standard error; with
    one common seed if the difference is above 0. Without a common seed nothing is said.
    """
    own = cell.values(accuracy_of)
    unbeaten = []
    for control in controls:
        other = control.values(accuracy_of)
        differences = [own[seed] - other[seed] for seed in own if seed in other]
        if not differences:
            continue
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        if not statistics.fmean(differences) > error:
            unbeaten.append(control.label)
    return unbeaten


def controls_of(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the controls of a cell at the same target: its own, those it shares, then the random and magnitude runs."""
    same = [other for other in cells if (other.kind, other.asked) == (cell.kind, cell.asked) and other is not cell]
    jobs = {job for run in cell.runs for job in run.shares}
    held = [other for other in same if other.runs[0].control_of == cell.label]
    held += [other for other in same if other not in held and any(run.job in jobs for run in other.runs)]
    for name in _BASELINES:
        if cell.runs[0].method != name and not any(_plays(other, name) for other in held):
            held += _baselines(cell, [other for other in same if not other.runs[0].control_of], name)
    return held


def _baselines(cell: Cell, others: Iterable[Cell], name: str) -> list[Cell]:
    """Cells of a method that controls others; if some of them ran under the same settings of the sweep, only these."""
    found = [other for other in others if other.runs[0].method == name]
    alike = [other for other in found if settings_of(other.runs[0]) == settings_of(cell.runs[0])]
    return alike or found


def _distinct(runs: Sequence[Run]) -> tuple[Run, ...]:
    """One run per seed: a shared control does not count beside a run that the sweep made of the same method."""
    own = [run for run in runs if not run.shared]
    seeds = {run.seed for run in own}
    return (*own, *(run for run in runs if run.shared and run.seed not in seeds))


def _plays(cell: Cell, control: str) -> bool:
    """Whether a cell stands in the column of a control."""
    return cell.runs[0].control == control or (not cell.runs[0].control and cell.runs[0].method == control)


def csv_text(runs: Iterable[Run]) -> str:
    """Return a row per run, with every figure of its receipt."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        values = [getattr(run, name) for name in COLUMNS]
        writer.writerow(["" if value is None else value for value in values])
    return buffer.getvalue()


def markdown(runs: Sequence[Run], pictures: Sequence[str] = ()) -> str:
    """Return the whole page: what ran, accuracy with controls, costs, failures, pictures."""
    cells = cells_of(runs)
    parts = ["# Sweep", _summary(runs)]
    pruned = [cell for cell in cells if cell.asked is not None or cell.kind != "sparsity"]
    kinds = dict.fromkeys(cell.kind for cell in pruned)
    for kind in kinds:
        title = f"budget of {kind}" if kind in KINDS else f"{kind} asked"
        mine = [cell for cell in pruned if cell.kind == kind]
        parts += [f"## Test accuracy in percent by {title}", _accuracy_table(mine, cells)]
    parts += _reading(cells) if kinds else []
    if cells:
        parts += ["## What it costs", _cost_table(cells)]
    parts += _failures(runs)
    parts += [f"![Accuracy against cost]({name})" for name in pictures if name.endswith(".png")]
    if not pictures and cells:
        parts.append(NO_PICTURE)
    return "\n\n".join(parts) + "\n"


def _summary(runs: Sequence[Run]) -> str:
    counts = {status: sum(run.status == status for run in runs) for status in ("finished", "failed", "unfinished")}
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(runs)} runs: {told}. Seeds: {', '.join(map(str, seeds)) or 'none'}."


def _accuracy_table(cells: Sequence[Cell], everything: Sequence[Cell]) -> str:
    shown = [cell for cell in cells if not cell.runs[0].control_of]
    base = [name for name in _BESIDE if any(_plays(cell, name) for cell in cells)]
    names = ["dense at equal FLOPs" if name == "dense" else name for name in base]
    header = ["asked", "method", "seeds", "dense", "right after pruning", "fine-tuned", *names, "not better than"]
    rows = []
    for cell in shown:
        controls = controls_of(cell, everything)
        beside = [next((other for other in controls if _plays(other, name)), None) for name in base]
        verdict = ", ".join(_short(label, cell) for label in not_beaten(cell, controls))
        rows.append(
            [
                "auto" if cell.asked is None else f"{cell.asked:g}",
                cell.label,
                str(len(cell.runs)),
                _percent(cell, lambda run: run.accuracy_dense),
                _percent(cell, lambda run: run.accuracy_pruned),
                _percent(cell, accuracy_of),
                *(_DASH if other is None else _control(other, cell) for other in beside),
                "(control)" if cell.runs[0].is_control else verdict,
            ]
        )
    return grid(header, rows, left=(1, len(header) - 1))


def _reading(cells: Sequence[Cell]) -> list[str]:
    text = (
        "Mean ± standard deviation over the seeds. A method stands beside its controls: its own mask shuffled within every "
        "layer, which is random pruning at the same layer rates; magnitude pruning at the same target; random pruning with the "
        "same fraction of every layer; and for methods that remove channels the smaller network trained from scratch for as "
        "many epochs (dense at equal FLOPs). "
        "\N{LEFT DOUBLE QUOTATION MARK}Not better than\N{RIGHT DOUBLE QUOTATION MARK} names the controls it does not beat by "
        "more than the standard error of the differences seed by seed."
    )
    single = any(len(cell.runs) == 1 for cell in cells if cell.asked is not None)
    return [text + (" With a single seed there is no spread, and any difference counts." if single else "")]


def _cost_table(cells: Sequence[Cell]) -> str:
    header = [
        "asked",
        "method",
        "sparsity reached",
        "parameters left",
        "FLOPs left",
        "bytes compressed",
        "ms dense",
        "ms",
    ]
    rows = [
        [
            _DASH if cell.asked is None else f"{cell.asked:g}",
            cell.label,
            _show(cell, lambda run: run.sparsity),
            _show(cell, lambda run: ratio(run.params_pruned, run.params_dense)),
            _show(cell, lambda run: ratio(run.flops_pruned, run.flops_dense)),
            _show(cell, lambda run: ratio(run.bytes_compressed, run.bytes_dense)),
            _show(cell, lambda run: run.ms_dense),
            _show(cell, milliseconds_of),
        ]
        for cell in cells
    ]
    return grid(header, rows, left=(1,))


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole, None where either is unknown."""
    return part / whole if part is not None and whole else None


def milliseconds_of(run: Run) -> float | None:
    """Return the median time of the smallest form of the model that was timed: exported, masked, dense."""
    times = (run.ms_exported, run.ms_masked, run.ms_dense)
    return next((time for time in times if time is not None), None)


def _failures(runs: Iterable[Run]) -> list[str]:
    rows = [[run.job, run.status, run.overrides, run.error] for run in runs if run.status != FINISHED]
    if not rows:
        return []
    return ["## Runs without a result", grid(["run", "status", "overrides", "error"], rows, left=(0, 1, 2, 3))]


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Return a Markdown table; columns in `left` are aligned to the left."""
    rule = [":--" if index in left else "--:" for index in range(len(header))]
    lines = [header, rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _percent(cell: Cell, quantity: Callable[[Run], float | None]) -> str:
    return _show(cell, lambda run: None if (value := quantity(run)) is None else 100 * value, ".2f")


def _show(cell: Cell, quantity: Callable[[Run], float | None], form: str = ".4g") -> str:
    mean, spread = mean_and_spread(cell.values(quantity).values())
    if mean is None:
        return _DASH
    return format(mean, form) + (f" ± {spread:{form if form != '.4g' else '.2g'}}" if spread else "")


def _control(control: Cell, cell: Cell) -> str:
    """The accuracy of a control; one that has fewer seeds than the method so far says how many."""
    held, wanted = len(control.values(accuracy_of)), len(cell.values(accuracy_of))
    return _percent(control, accuracy_of) + (f" ({held} of {wanted} seeds)" if held < wanted else "")


def _short(label: str, cell: Cell) -> str:
    return label.removeprefix(f"{cell.label}, ")


def _level(cell: Cell) -> float:
    return -1.0 if cell.asked is None else cell.asked if "sparsity" in cell.kind else 1.0 - cell.asked
