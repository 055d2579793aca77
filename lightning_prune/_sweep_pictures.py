"""The Pareto picture of a sweep: final accuracy against measured sparsity, FLOPs, bytes and milliseconds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_prune._sweep_read import Run
from lightning_prune._sweep_tables import Cell, accuracy_of, mean_and_spread, milliseconds_of, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Callable[[Run], float | None]
PANELS: tuple[tuple[str, Quantity], ...] = (
    ("sparsity of the selected weights", lambda run: run.sparsity),
    ("FLOPs left (fraction)", lambda run: ratio(run.flops_pruned, run.flops_dense)),
    ("compressed bytes (fraction of the dense file)", lambda run: ratio(run.bytes_compressed, run.bytes_dense)),
    ("milliseconds per forward pass", milliseconds_of),
)
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#97266d", "#6b46c1", "#b7791f", "#285e61", "#9b2c2c")
_CONTROL, _INK, _FAINT = "#9aa5b1", "#22272e", "#7a828c"


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


def _draw(figure: Figure, cells: Sequence[Cell]) -> None:
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.runs[0].method != "none":
            lines.setdefault(cell.label, []).append(cell)
    styles = _styles(lines)
    axes_of = figure.subplots(2, 2).flatten()
    for axes, (title, quantity) in zip(axes_of, PANELS, strict=True):
        for label, members in lines.items():
            loose = {"linestyle": "none"} if quantity is milliseconds_of else {}  # times are too noisy for a line
            _line(axes, points(members, quantity), label, {**styles[label], **loose})
        _dense(axes, cells)
        axes.set_ylim(*_limits(cells))
        if quantity is PANELS[0][1]:
            _stretch(axes, points([cell for held in lines.values() for cell in held], quantity))
        axes.set_xlabel(title, color=_INK)
        axes.set_ylabel("test accuracy, percent", color=_INK)
        axes.grid(color="#e9ecef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes_of[0].get_legend_handles_labels()
    figure.suptitle("Accuracy after fine-tuning against what is left", x=0.02, ha="left", weight="bold", color=_INK)
    figure.legend(handles, labels, loc="lower center", ncol=min(4, max(1, len(labels))), frameon=False)
    rows = -(-max(1, len(labels)) // 4)
    figure.tight_layout(rect=(0, 0.03 + 0.028 * rows, 1, 0.98))


def _limits(cells: Sequence[Cell]) -> tuple[float, float]:
    """The part of the accuracies where methods are: a control that collapses leaves the picture instead of squeezing it."""
    own = [cell for cell in cells if not cell.runs[0].is_control] or list(cells)
    values = [100 * value for cell in own for value in cell.values(accuracy_of).values()]
    values += [100 * run.accuracy_dense for cell in cells for run in cell.runs if run.accuracy_dense is not None]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    room = max(0.5, 0.5 * (high - low))
    return max(0.0, low - room), high + 0.3 * room


def _stretch(axes: Axes, held: Sequence[tuple[float, float, float]]) -> None:
    """Show sparsity by the logarithm of what is kept: 0.9, 0.99 and 0.999 are equally far apart."""
    import numpy as np

    def forward(sparsity: Any) -> Any:
        return -np.log10(np.clip(1 - np.asarray(sparsity, dtype=float), 1e-6, None))

    axes.set_xscale("function", functions=(forward, lambda value: 1 - 10.0 ** -np.asarray(value, dtype=float)))
    ticks = sorted({round(cost, 3) for cost, _, _ in held})
    if 0 < len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _line(axes: Axes, held: Sequence[tuple[float, float, float]], label: str, style: dict[str, Any]) -> None:
    if held:
        cost, accuracy, spread = zip(*held, strict=True)
        axes.errorbar(cost, accuracy, yerr=spread, label=label, capsize=2.5, linewidth=1.5, markersize=5, **style)


def _dense(axes: Axes, cells: Sequence[Cell]) -> None:
    known = {run.seed: run.accuracy_dense for cell in cells for run in cell.runs if run.accuracy_dense is not None}
    if known:
        mean = 100 * sum(known.values()) / len(known)
        axes.axhline(mean, color=_FAINT, linestyle=":", linewidth=1.2, label="dense")


def _styles(lines: dict[str, list[Cell]]) -> dict[str, dict[str, Any]]:
    """Methods in colours, controls grey and dashed, so that the eye compares what has to be compared."""
    styles: dict[str, dict[str, Any]] = {}
    methods = [label for label, members in lines.items() if not members[0].runs[0].is_control]
    controls = [label for label in lines if label not in methods]
    for number, label in enumerate(methods):
        styles[label] = {"color": _COLOURS[number % len(_COLOURS)], "marker": "os^Dv*"[number % 6]}
    for number, label in enumerate(controls):
        styles[label] = {"color": _CONTROL, "linestyle": "--", "marker": "x+1234"[number % 6]}
    return styles
