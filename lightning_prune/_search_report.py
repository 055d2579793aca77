"""What a search leaves: `search.json`, `search.md` and, where matplotlib is installed, `search.png`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_prune._sweep_tables import grid
from lightning_prune.files import replacing
from lightning_prune.search import Point, SearchResult, standard_error

if TYPE_CHECKING:
    from lightning_prune._search_run import Evaluator

SEARCH_FILE = "search.json"
_DASH = "\N{EN DASH}"


def save(evaluator: Evaluator, result: SearchResult, folder: Path) -> None:
    """Write the files and print the table."""
    facts = {
        "max_drop": evaluator.max_drop, "knob": evaluator.knob, "split": evaluator.split, "samples": evaluator.samples,
        "dense_accuracy": evaluator.dense_accuracy, "dense_test_accuracy": evaluator.dense_test_accuracy,
        "floor": evaluator.floor, "margin": evaluator.margin, **result.to_dict(),
    }  # fmt: skip
    page = markdown(facts, result)
    picture = png(facts, result)
    contents = {SEARCH_FILE: json.dumps(facts, indent=2, default=str).encode(), "search.md": page.encode()}
    for name, content in {**contents, **({"search.png": picture} if picture else {})}.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    Console().print(page, markup=False, highlight=False, soft_wrap=True)


def markdown(facts: dict[str, Any], result: SearchResult) -> str:
    """Return the verdict and every evaluation."""
    rows = [
        [
            _value(point, facts),
            point.role,
            str(point.seed),
            _DASH if point.accuracy is None else f"{100 * point.accuracy:.2f}",
            _DASH if point.accuracy is None else f"{100 * point.needed:.2f}",
            _DASH if point.test_accuracy is None else f"{100 * point.test_accuracy:.2f}",
            point.error or ("yes" if point.feasible else "no"),
        ]
        for point in result.points
    ]
    header = [facts["knob"], "role", "seed", f"{facts['split']} accuracy", "needed", "test accuracy", "feasible"]
    parts = ["# Search", verdict(facts, result), grid(header, rows, left=(1, 6))]
    parts.append(
        f"Accuracies in percent. Needed is the dense {100 * facts['dense_accuracy']:.2f} minus the drop allowed, "
        f"{100 * facts['max_drop']:g}, plus {facts['margin']:g} times the standard error of the accuracy measured on "
        f"{facts['samples'] or 'an unknown number of'} samples; on the test set the drop itself must hold too."
    )
    if 2 * facts["margin"] * standard_error(facts["dense_accuracy"], facts["samples"]) > facts["max_drop"]:
        parts.append(
            f"The margin is more than half of the drop: {facts['samples']} samples cannot tell such accuracies apart, and a "
            "larger set would find more. Hold out more samples, allow a larger drop, or lower `search.margin`."
        )
    return "\n\n".join(parts) + "\n"


def verdict(facts: dict[str, Any], result: SearchResult) -> str:
    """Say what was found, and whether it was confirmed."""
    if result.best is None:
        once = sum(point.feasible for point in result.points)
        if once:
            return (
                f"No {facts['knob']} is within {_points(facts)} of dense for sure: of {once} that were feasible once, none "
                "was again with another seed. The dense network stays."
            )
        return (
            f"No {facts['knob']} was measured whose accuracy stays within {_points(facts)} of dense. "
            "The dense network stays."
        )
    told = {True: "confirmed with another seed", None: "not confirmed with another seed"}[result.confirmed or None]
    superlative = "Lowest budget" if facts["knob"] == "budget" else "Highest sparsity"
    return (
        f"{superlative} measured within {_points(facts)} of dense: {_value(result.best, facts)}, {told}, "
        f"after {len(result.points)} evaluations."
    )


def png(facts: dict[str, Any], result: SearchResult) -> bytes | None:
    """Draw accuracy against what is kept; None where matplotlib is not installed or nothing was measured."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    measured = [point for point in result.points if point.accuracy is not None]
    if not measured:
        return None
    figure = Figure(figsize=(7.5, 4.5), facecolor="white", dpi=120)
    axes = figure.add_subplot()
    for feasible, colour, label in ((True, "#2f855a", "feasible"), (False, "#c05621", "not feasible")):
        held = [point for point in measured if point.feasible is feasible]
        values = [(1 - point.sparsity, 100 * (point.accuracy or 0.0)) for point in held]
        axes.scatter([x for x, _ in values], [y for _, y in values], color=colour, label=label, zorder=3)
    axes.axhline(100 * facts["dense_accuracy"], color="#7a828c", linestyle=":", label="dense")
    axes.axhline(100 * facts["floor"], color="#2b6cb0", linestyle="--", label="dense minus the drop allowed")
    axes.set(xscale="log", xlabel="fraction kept", ylabel=f"{facts['split']} accuracy, percent")
    axes.grid(color="#e9ecef")
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _points(facts: dict[str, Any]) -> str:
    drop = f"{100 * facts['max_drop']:g}"
    return f"{drop} point{'' if drop == '1' else 's'}"


def _value(point: Point, facts: dict[str, Any]) -> str:
    return f"{point.sparsity if facts['knob'] == 'sparsity' else 1 - point.sparsity:.6g}"
