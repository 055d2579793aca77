"""How a receipt looks: its sentences, tables, Markdown and picture. Nothing here changes a receipt."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lightning_prune._receipt_stages import HEADER as STAGES_HEADER
from lightning_prune._receipt_stages import draw_stages, stage_rows, stages_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_prune.receipt import Receipt

ZEROS_ARE_NOT_FASTER = "Zeros in dense tensors do not make this model faster."
NO_COMPRESSED_SIZE = "The compressed size was not measured."

_DASH = "\N{EN DASH}"
_COST_NAMES = {
    "params": "parameters",
    "flops": "FLOPs",
    "volume": "activation volume",
    "channels": "channels",
}


def expected_kept(sparsity: float, total: int) -> int:
    """Return how many weights a sparsity leaves: total - floor(sparsity * total + 1e-9).

    Args:
        sparsity: pruned fraction, in [0, 1).
        total: number of selected weights, >= 0.

    Returns:
        Kept weights, in [0, total].
    """
    return total - math.floor(sparsity * total + 1e-9)


# ---- sentences


def honest_sentences(receipt: Receipt, reason: str) -> list[str]:
    """Return target met or missed, zeros are not faster, medians, missing sizes; see `honest_notes`."""
    sentences = [_target_sentence(receipt, reason)]
    if receipt.reached["kept"] < receipt.reached["total"] and not _is_smaller(receipt):
        sentences.append(ZEROS_ARE_NOT_FASTER)
    sentences.append(_speed_sentence(receipt.milliseconds))
    if receipt.bytes["pruned"] is not None and receipt.bytes["compressed"] is None:
        sentences.append(NO_COMPRESSED_SIZE)
    return [sentence for sentence in sentences if sentence]


def _is_smaller(receipt: Receipt) -> bool:
    """Whether anything was physically removed: only then are fewer FLOPs executed."""
    cost = receipt.reached["flops"] or receipt.reached["channels"]
    return cost is not None and cost["pruned"] < cost["dense"]


def _target_sentence(receipt: Receipt, reason: str) -> str:
    requested, reached = receipt.requested, receipt.reached
    if isinstance(requested.get("sparsity"), (int, float)):
        return _sparsity_sentence(requested["sparsity"], reached, reason)
    cost = reached.get(str(requested.get("budget_type")))
    if isinstance(requested.get("budget"), (int, float)) and cost and cost["dense"]:
        return _budget_sentence(requested["budget"], _COST_NAMES[requested["budget_type"]], cost)
    return ""


def _sparsity_sentence(asked: float, reached: dict[str, Any], reason: str) -> str:
    kept, total, due = reached["kept"], reached["total"], expected_kept(asked, reached["total"])
    start = f"Asked for sparsity {asked:.6g}, got {reached['sparsity']:.6g}: "
    if kept == due:
        return f"{start}{kept:,} of {total:,} selected weights are kept, exactly the count the target sets."
    because = f", because {reason}" if reason else ""
    return f"{start}{kept:,} of {total:,} selected weights are kept where the target leaves {due:,}{because}."


def _budget_sentence(asked: float, what: str, cost: dict[str, Any]) -> str:
    verdict = "within" if cost["pruned"] <= asked * cost["dense"] + 1e-9 else "above"
    share = f"{cost['pruned'] / cost['dense']:.6g} ({cost['pruned']:,} of {cost['dense']:,})"
    return f"Asked for at most {asked:.6g} of the {what}, got {share}: {verdict} the budget."


def _speed_sentence(milliseconds: dict[str, Any]) -> str:
    measured = {name: timing for name, timing in milliseconds.items() if timing}
    if not measured:
        return ""
    medians = ", ".join(f"{name} {_ms(timing['median'])} ms" for name, timing in measured.items())
    return f"Measured medians{_conditions(measured)}: {medians}."


def _conditions(milliseconds: dict[str, Any]) -> str:
    """Say under what the times were taken: " per batch of 64 on 2 threads"."""
    threads = next((timing.get("threads") for timing in milliseconds.values() if timing), None)
    return _per_batch(milliseconds) + (f" on {threads} thread{'s' * (threads != 1)}" if threads else "")


def _per_batch(milliseconds: dict[str, Any]) -> str:
    size = next((timing.get("batch_size") for timing in milliseconds.values() if timing), None)
    return f" per batch of {size:,}" if size is not None else ""


def headline(receipt: Receipt) -> str:
    """Say in one line what was asked and what was got."""
    requested, reached = receipt.requested, receipt.reached
    got = f"{reached['sparsity']:.6g}"
    if requested.get("budget") is not None:
        what = str(requested.get("budget_type"))
        asked, cost = f"at most {requested['budget']} of the {_COST_NAMES.get(what, what)}", reached.get(what)
        got = f"{cost['pruned'] / cost['dense']:.6g}" if cost and cost["dense"] else f"sparsity {got}"
    elif requested.get("sparsity") is not None:
        asked = f"sparsity {requested['sparsity']}"
    else:
        plain = {name: value for name, value in requested.items() if isinstance(value, (str, int, float))}
        asked, got = ", ".join(f"{name} {value}" for name, value in plain.items()), f"sparsity {got}"
    return f"{receipt.method}: asked for {asked or 'no target'}, got {got}"


# ---- tables


def _show(value: Any, form: str = ",") -> str:
    return _DASH if value is None else format(value, form)


def _timing(timing: dict[str, Any] | None) -> str:
    if not timing:
        return _DASH
    return f"{_ms(timing['median'])} [{_ms(timing['low'])}{_DASH}{_ms(timing['high'])}]"


def _ms(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def summary_rows(receipt: Receipt) -> list[tuple[str, str, str, str]]:
    """Return the main table: what is measured, dense, pruned, fine-tuned.

    Fine-tuning moves values, not masks: what only the masks decide is repeated in its column. The compressed
    size depends on the values and was taken from the final ones, so it stands in the last filled column.
    """
    reached, accuracy, sizes, times = receipt.reached, receipt.accuracy, receipt.bytes, receipt.milliseconds
    tuned = accuracy["finetuned"] is not None
    dense, pruned, finetuned = (_show(accuracy[key], ".4f") for key in ("dense", "pruned", "finetuned"))
    rows = [("accuracy", dense, pruned, finetuned)]

    def add(label: str, dense: str, pruned: str) -> None:
        rows.append((label, dense, pruned, pruned if tuned else _DASH))

    add("weights kept", _show(reached["total"]), _show(reached["kept"]))
    add("sparsity, selected", _show(0.0, ".4f"), _show(reached["sparsity"], ".4f"))
    params = reached["params"]
    whole = 1 - params["pruned"] / params["dense"] if params and params["dense"] else None
    add("sparsity, whole model", _show(0.0 if params else None, ".4f"), _show(whole, ".4f"))
    add("bytes on disk", _show(sizes["dense"]), _show(sizes["pruned"]))
    packed = _show(sizes["compressed"])
    rows.append(("bytes compressed", _DASH, _DASH if tuned else packed, packed if tuned else _DASH))
    for name in ("flops", "volume", "channels"):
        cost = reached[name] or {}
        if cost or name == "flops":
            add(_COST_NAMES[name], _show(cost.get("dense")), _show(cost.get("pruned")))
    add(f"ms{_per_batch(times)}", _timing(times["dense"]), _timing(times["masked"]))
    if times["exported"]:
        add("ms, exported", _DASH, _timing(times["exported"]))
    return rows


_SUMMARY_HEADER = ("", "dense", "pruned", "fine-tuned")
_LAYER_HEADER = ("layer", "shape", "kept", "total", "sparsity")


def layer_rows(receipt: Receipt) -> list[tuple[str, str, str, str, str]]:
    """Return name, shape, kept, total and sparsity of every layer."""
    rows = []
    for layer in receipt.layers:
        kept, total = layer["kept"], layer["total"]
        shape = " x ".join(map(str, layer["shape"])) or "scalar"
        rows.append((layer["name"], shape, f"{kept:,}", f"{total:,}", f"{_pruned_share(kept, total):.4f}"))
    return rows


def _pruned_share(kept: int, total: int) -> float:
    return (total - kept) / total if total else 0.0


def main_table(receipt: Receipt) -> Table:
    """Return the main table with asked and got as its title."""
    return _table(headline(receipt), _SUMMARY_HEADER, summary_rows(receipt), left=1)


def layer_table(receipt: Receipt) -> Table:
    """Return the kept weights of every layer."""
    return _table("Kept weights per layer", _LAYER_HEADER, layer_rows(receipt), left=2)


def _table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]], left: int) -> Table:
    # names go in as Text: square brackets in them are no markup
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown(receipt: Receipt) -> str:
    """Return headline, tables, notes, command and versions as Markdown."""
    parts = [f"# {_escape(headline(receipt))}", _grid(_SUMMARY_HEADER, summary_rows(receipt), left=1)]
    if receipt.notes:
        parts.append("\n".join(f"- {_escape(note)}" for note in receipt.notes))
    if stage_rows(receipt):
        parts += ["## Gates", _grid(STAGES_HEADER, stage_rows(receipt), left=1)]
    if receipt.layers:
        parts += ["## Layers", _grid(_LAYER_HEADER, layer_rows(receipt), left=2)]
    if receipt.command is not None:
        parts += ["## Command", f"```shell\n{receipt.command}\n```"]
    used = ", ".join(f"{name} {version}" for name, version in receipt.versions.items())
    parts.append(f"Seed {_show(receipt.seed, '')}. {_escape(used)}.")
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """Keep a name from being read as Markdown."""
    for mark in "\\|*_<`":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def _grid(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], left: int) -> str:
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    lines = [header, rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- picture

_COLOURS = {"dense": "#8a929c", "pruned": "#2b6cb0", "fine-tuned": "#2f855a", "compressed": "#8fb8de"}
_TRACK, _INK, _FAINT = "#e9ecef", "#22272e", "#7a828c"
_WIDTH, _TOP, _BOTTOM = 12.0, 0.95, 0.3  # inches, as are the two pitches from bar to bar
_PITCH, _WIDE_PITCH = 0.26, 0.42
_MAX_BARS, _NAME_LENGTH, _TITLE_LENGTH = 60, 34, 105

Bar = tuple[str, float | None, str, str]  # label, length in [0, 1] or None, text beside it, colour


def png(receipt: Receipt) -> bytes | None:
    """Draw kept weights per layer beside accuracy and file sizes; None where matplotlib is not installed."""
    try:
        # the object interface: pyplot would keep the figure alive and choose a backend for the whole process
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    layers, stages = layer_bars(receipt.layers), stages_of(receipt)
    body = max(5.4 if stages else 3.3, _PITCH * len(layers))
    figure = Figure(figsize=(_WIDTH, body + _TOP + _BOTTOM), facecolor="white", dpi=150)
    canvas = FigureCanvasAgg(figure)
    title, height = shorten(headline(receipt), _TITLE_LENGTH), figure.get_figheight()
    style: dict[str, Any] = {"size": 13, "weight": "bold", "color": _INK, "va": "center", "parse_math": False}
    figure.text(0.025, 1 - 0.3 / height, title, **style)
    _draw(figure, (2.8, 0.0, 3.0, body), "Weights kept per layer", layers)
    names = {"dense": "dense", "pruned": "pruned", "fine-tuned": "finetuned"}
    accuracy = {name: receipt.accuracy[key] for name, key in names.items()}
    _draw(figure, (8.75, 0.0, 2.0, 1.25), "Accuracy", _measure_bars(accuracy, ".4f", at_least=1.0))
    _draw(figure, (8.75, 2.0, 2.0, 1.25), "Bytes on disk", _measure_bars(receipt.bytes, ",", at_least=1.0))
    if stages:
        draw_stages(figure, (8.75 / _WIDTH, 1 - (_TOP + 5.2) / height, 2.0 / _WIDTH, 1.2 / height), stages, _INK)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def layer_bars(layers: list[dict[str, Any]]) -> list[Bar]:
    """Return a bar per layer; beyond 60 layers the smallest share the last bar."""
    names = _short_names([layer["name"] for layer in layers])
    bars = [_layer_bar(name, layer["kept"], layer["total"]) for name, layer in zip(names, layers, strict=True)]
    if len(layers) <= _MAX_BARS:
        return bars
    by_size = sorted(range(len(layers)), key=lambda index: -layers[index]["total"])
    largest, rest = sorted(by_size[: _MAX_BARS - 1]), by_size[_MAX_BARS - 1 :]
    kept, total = (sum(layers[index][key] for index in rest) for key in ("kept", "total"))
    return [bars[index] for index in largest] + [_layer_bar(f"{len(rest)} smaller layers", kept, total)]


def _layer_bar(name: str, kept: int, total: int) -> Bar:
    return name, 1 - _pruned_share(kept, total), f"{kept:,} of {total:,}", _COLOURS["pruned"]


def _short_names(names: list[str]) -> list[str]:
    """Shorten names that are too long: first by the path all share, then in the middle."""
    folders = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, folders))
    if shared and len(names) > 1 and max(map(len, names)) > _NAME_LENGTH:
        names = [f"\N{HORIZONTAL ELLIPSIS}{name.split('.', shared)[-1]}" for name in names]
    return [shorten(name, _NAME_LENGTH) for name in names]


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a text longer than `length` characters, >= 3; start and end tell layers apart."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - tail :]}"


def _measure_bars(values: dict[str, Any], form: str, at_least: float) -> list[Bar]:
    known = [value for value in values.values() if value is not None and math.isfinite(value)]
    longest = max([at_least, *known])
    return [
        (name, value / longest, format(value, form), _COLOURS[name])
        if value is not None and math.isfinite(value)
        else (name, None, "not measured", _COLOURS[name])
        for name, value in values.items()
    ]


def _draw(figure: Figure, box: tuple[float, float, float, float], title: str, bars: list[Bar]) -> None:
    """Draw labelled horizontal bars in a box (left, distance from the top, width, height; inches)."""
    left, down, wide, tall = box
    height = figure.get_figheight()
    axes = figure.add_axes((left / _WIDTH, 1 - (_TOP + down + tall) / height, wide / _WIDTH, tall / height))
    axes.set_title(title, loc="left", size=10.5, color=_INK, pad=6)
    axes.spines[:].set_visible(False)
    rows = tall / min(_WIDE_PITCH, max(_PITCH, tall / max(len(bars), 1)))
    axes.set(xlim=(0, 1), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    if not bars:
        axes.text(0, 0, "nothing was masked", size=9, color=_FAINT, va="center")
    for row, (label, length, text, colour) in enumerate(bars):
        axes.barh(row, 1, height=0.62, color=_TRACK)
        axes.barh(row, max(0.0, length or 0.0), height=0.62, color=colour)
        ink = _FAINT if length is None else _INK
        axes.text(-0.03, row, label, size=9, color=_INK, ha="right", va="center", parse_math=False)
        axes.text(1.03, row, text, size=9, color=ink, va="center", parse_math=False)
