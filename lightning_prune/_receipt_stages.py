"""How a receipt shows gates that were trained in stages: one histogram per stage, as text and as a picture.

A certificate with `stages` has them, each with a `histogram` of the gates' values from 0 to 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_prune.receipt import Receipt

HEADER = ("stage", "soft cost", "hard cost", "soft loss", "hard loss", "gates from 0 to 1")
_BLOCKS = "·▁▂▃▄▅▆▇█"


def stages_of(receipt: Receipt) -> list[dict[str, Any]]:
    """Return the stages of a receipt's certificate that have a histogram; none for other methods."""
    certificate = receipt.certificate if isinstance(receipt.certificate, dict) else {}
    stages = certificate.get("stages")
    return [stage for stage in stages if "histogram" in stage] if isinstance(stages, list) else []


def bars(counts: list[int]) -> str:
    """Return a histogram as one line of block characters; every bin that is not empty shows."""
    largest = max([1, *counts])
    return "".join(_BLOCKS[math.ceil(8 * count / largest)] for count in counts)


def stage_rows(receipt: Receipt) -> list[tuple[str, ...]]:
    """Return one row of text per stage, under `HEADER`."""
    return [
        (
            str(stage["stage"]),
            *(_number(stage.get(key)) for key in ("soft_share", "hard_share", "soft_loss", "hard_loss")),
            bars(stage["histogram"]),
        )
        for stage in stages_of(receipt)
    ]


def draw_stages(figure: Figure, box: tuple[float, float, float, float], stages: list[dict[str, Any]], ink: str) -> None:
    """Draw the histograms side by side, a column per stage, dark where many gates are.

    Args:
        figure: what to draw in.
        box: left, bottom, width and height, as fractions of the figure.
        stages: result of `stages_of`, not empty.
        ink: colour of text.
    """
    axes = figure.add_axes(box)
    columns = [[math.log1p(count) for count in stage["histogram"]] for stage in stages]
    axes.imshow(
        list(zip(*columns, strict=True)), origin="lower", aspect="auto", cmap="Blues", extent=(0, len(columns), 0, 1)
    )
    axes.set_title("Gates, stage by stage", loc="left", size=10.5, color=ink, pad=6)
    axes.set(yticks=[0, 0.5, 1], xticks=[0, len(columns)])
    axes.tick_params(labelsize=9, colors=ink, length=0)
    axes.spines[:].set_visible(False)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
