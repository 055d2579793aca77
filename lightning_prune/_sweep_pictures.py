"""The Pareto picture of a sweep: final accuracy against measured sparsity, FLOPs, bytes and milliseconds."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_prune._sweep_read import Run
from lightning_prune._sweep_tables import Cell, accuracy_of, mean_and_spread, milliseconds_of, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Callable[[Run], float | None]
_SPARSITY, _FLOPS, _BYTES = (
    "sparsity of the selected weights",
    "FLOPs left (fraction)",
    "compressed bytes (fraction of the dense file)",
)
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#97266d", "#6b46c1", "#b7791f", "#285e61", "#9b2c2c")
_MARKERS = "os^Dv*Pd"
_INK, _FAINT = "#22272e", "#7a828c"
_BASELINES = {"random": ("#9aa5b1", "X", ":"), "magnitude": ("#5c6670", "p", "--")}  # grey, where they are controls
_OF_ITS_OWN: dict[str, tuple[str, Any, str]] = {
    "shuffled": ("x", ":", "its mask shuffled"),
    "magnitude": ("+", "--", "magnitude, same budget"),
    "random": ("1", (0, (1, 3)), "random, same sparsity"),
    "dense": ("|", "-.", "dense at equal FLOPs"),
}
_FEW = 6  # lines of controls of single methods that a picture still bears
_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def pictures(cells: Sequence[Cell]) -> dict[str, bytes]:
    """Draw the Pareto picture.

    Args:
        cells: finished runs by method and target.
    Returns:
        The contents of `pareto.png` and `pareto.svg`; empty where matplotlib is not installed or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    if not any(cell.values(accuracy_of) for cell in cells):
        return {}
    figure = Figure(figsize=(12.5, 8.2), facecolor="white", dpi=120)
    _draw(figure, cells)
    held: dict[str, bytes] = {}
    for name, canvas in (("pareto.png", FigureCanvasAgg(figure)), ("pareto.svg", FigureCanvasSVG(figure))):
        buffer = io.BytesIO()
        canvas.print_figure(buffer, format=name.rpartition(".")[2])
        held[name] = buffer.getvalue()
    return held


def points(cells: Sequence[Cell], quantity: Quantity) -> list[tuple[float, float, float]]:
    """Return (cost, accuracy in percent, its standard deviation or 0) of every cell where both are known, by cost."""
    found = []
    for cell in cells:
        cost, _ = mean_and_spread(cell.values(quantity).values())
        accuracy, spread = mean_and_spread(cell.values(accuracy_of).values())
        if cost is not None and accuracy is not None:
            found.append((cost, 100 * accuracy, 100 * (spread or 0.0)))
    return sorted(found)


def panels(cells: Sequence[Cell]) -> list[tuple[str, Quantity]]:
    """Return the four horizontal axes.

    Milliseconds are timed in every run for itself, dense and pruned one after the other. On a machine that does other work
    only their ratio says something, so they are shown for the median dense time of all runs.
    """
    dense = [run.ms_dense for cell in cells for run in cell.runs if run.ms_dense]
    usual = statistics.median(dense) if dense else None

    def milliseconds(run: Run) -> float | None:
        relative = ratio(milliseconds_of(run), run.ms_dense)
        return None if relative is None or usual is None else relative * usual

    told = "milliseconds per forward pass" + ("" if usual is None else f" (dense: {usual:.2g})")
    return [
        (_SPARSITY, lambda run: run.sparsity),
        (_FLOPS, lambda run: ratio(run.flops_pruned, run.flops_dense)),
        (_BYTES, lambda run: ratio(run.bytes_compressed, run.bytes_dense)),
        (told, milliseconds),
    ]


def _draw(figure: Figure, cells: Sequence[Cell]) -> None:
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.runs[0].method != "none" or cell.runs[0].control:
            lines.setdefault(cell.label, []).append(cell)
    own = [label for label, members in lines.items() if members[0].runs[0].control_of]
    if len(own) > _FEW:
        lines = {label: members for label, members in lines.items() if label not in own}
    styles = _styles(lines)
    axes_of = figure.subplots(2, 2).flatten()
    for axes, (title, quantity) in zip(axes_of, panels(cells), strict=True):
        held = {label: points(members, quantity) for label, members in lines.items()}
        for label, found in held.items():
            loose = title.startswith("milli") or len({round(cost, 3) for cost, _, _ in found}) < 2
            _line(axes, found, {**styles[label], **({"linestyle": "none"} if loose else {})})
        _dense(axes, cells)
        axes.set_ylim(*_limits(cells))
        _scale(axes, title, [cost for found in held.values() for cost, _, _ in found])
        axes.set_xlabel(title, color=_INK)
        axes.set_ylabel("test accuracy, percent", color=_INK)
        axes.grid(color="#e9ecef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = _legend(lines, styles)
    title = "Accuracy after fine-tuning against what is left"
    figure.suptitle(title, x=0.02, ha="left", weight="bold", color=_INK)
    if len(own) > _FEW:
        told = "Mean and standard deviation over the seeds. Controls of single methods are in the table."
        figure.text(0.98, 0.972, told, ha="right", size=9, color=_FAINT)
    figure.legend(handles=handles, loc="lower center", ncol=min(5, max(1, len(handles))), frameon=False)
    rows = -(-max(1, len(handles)) // 5)
    figure.tight_layout(rect=(0, 0.02 + 0.028 * rows, 1, 0.98))


def _limits(cells: Sequence[Cell]) -> tuple[float, float]:
    """The part of the accuracies where methods are: a control that collapses leaves the picture instead of squeezing it."""
    own = [cell for cell in cells if not cell.runs[0].is_control] or list(cells)
    values = [100 * value for cell in own for value in cell.values(accuracy_of).values()]
    values += [100 * run.accuracy_dense for cell in cells for run in cell.runs if run.accuracy_dense is not None]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    room = max(0.5, 0.5 * (high - low))
    return max(0.0, low - room), high + 0.3 * room


def _scale(axes: Axes, title: str, costs: Sequence[float]) -> None:
    """Show fractions by their logarithm: keeping a tenth and keeping a hundredth are as far apart as all and a tenth."""
    if not costs or title not in (_SPARSITY, _FLOPS, _BYTES):
        return
    kept = [max(1 - cost, 1e-6) for cost in costs] if title == _SPARSITY else [max(cost, 1e-6) for cost in costs]
    low, high = min(kept) / 1.25, max(kept) * 1.15
    if title == _SPARSITY:
        import numpy as np

        axes.set_xscale(
            "function",
            functions=(
                lambda value: -np.log10(np.clip(1 - np.asarray(value, dtype=float), 1e-7, None)),
                lambda value: 1 - 10.0 ** -np.asarray(value, dtype=float),
            ),
        )
        axes.set_xlim(1 - high, 1 - low)
        _ticks(axes, [tick for tick in _TICKS if low <= 1 - tick <= high])
    elif high / low > 4:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        _ticks(axes, [tick for tick in _FRACTIONS if low <= tick <= high])


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    if len(places) > 1:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()


def _line(axes: Axes, held: Sequence[tuple[float, float, float]], style: dict[str, Any]) -> None:
    if held:
        cost, accuracy, spread = zip(*held, strict=True)
        axes.errorbar(cost, accuracy, yerr=spread, capsize=2.5, **style)


def _dense(axes: Axes, cells: Sequence[Cell]) -> None:
    known = {run.seed: run.accuracy_dense for cell in cells for run in cell.runs if run.accuracy_dense is not None}
    if known:
        axes.axhline(100 * sum(known.values()) / len(known), color=_FAINT, linestyle=(0, (1, 1)), linewidth=1.2)


def _styles(lines: dict[str, list[Cell]]) -> dict[str, dict[str, Any]]:
    """A colour per method, which its own controls share; grey for controls that belong to all."""
    styles: dict[str, dict[str, Any]] = {}
    first = {label: members[0].runs[0] for label, members in lines.items()}
    methods = [label for label, run in first.items() if not run.is_control]
    for number, label in enumerate(methods):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        styles[label] = {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 5.5}
    for label, run in first.items():
        if label not in styles and not run.control_of:
            colour, marker, dash = _BASELINES.get(run.method, (_FAINT, "X", ":"))
            styles[label] = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.6, "markersize": 6}
    for label, run in first.items():
        if label not in styles:
            marker, dash, _ = _OF_ITS_OWN[run.control]
            owner = styles.get(run.control_of, {"color": _FAINT})
            faint = {"linestyle": dash, "linewidth": 1.1, "markersize": 6, "alpha": 0.65}
            styles[label] = {"color": owner["color"], "marker": marker, **faint}
    return styles


def _legend(lines: dict[str, list[Cell]], styles: dict[str, dict[str, Any]]) -> list[Any]:
    """A handle per method, one per kind of control, one for dense."""
    from matplotlib.lines import Line2D

    handles = []
    kinds: dict[str, None] = {}
    for label, members in lines.items():
        run = members[0].runs[0]
        if run.control_of:
            kinds.setdefault(run.control)
        else:
            handles.append(Line2D([], [], label=label + (" (control)" if run.is_control else ""), **styles[label]))
    for kind in kinds:
        marker, dash, told = _OF_ITS_OWN[kind]
        handles.append(Line2D([], [], label=told, color=_FAINT, marker=marker, linestyle=dash, linewidth=1.1))
    return [*handles, Line2D([], [], label="dense", color=_FAINT, linestyle=(0, (1, 1)), linewidth=1.2)]
