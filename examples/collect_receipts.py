"""`python examples/collect_receipts.py multirun` : one table from the receipts of many runs.

Reads every `receipt.json` below the folders, groups runs that differ in nothing but the seed, and prints
mean and standard deviation over the seeds: a row per sparsity, a column per method. `--stage pruned`
shows the accuracy right after pruning, before fine-tuning; `--markdown` prints a table to paste.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_prune import Receipt

Cells = dict[float, dict[str, dict[int | None, float]]]  # sparsity -> column -> seed -> accuracy
TITLES = {
    "finetuned": "test accuracy in percent after fine-tuning",
    "pruned": "test accuracy in percent right after pruning",
    "compressed": "compressed bytes in percent of the dense file",
}


def load(folders: Iterable[Path]) -> list[Receipt]:
    """Return all receipts below the folders, in the order of their paths.

    Raises:
        SystemExit: there is none.
    """
    paths = [path for folder in folders for path in sorted(folder.rglob("receipt.json"))]
    if not paths:
        raise SystemExit("no receipt.json below the given folders. Run `lightning-prune -m ...` first.")
    return [Receipt.load(path) for path in paths]


def labels(receipts: Sequence[Receipt]) -> list[str]:
    """Name each run by its method and the arguments in which its runs differ, sparsity and seed aside."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for receipt in receipts:
        for name, value in receipt.arguments.items():
            values[receipt.method, name].add(str(value))
    return [
        " ".join(
            [receipt.method]
            + [
                f"{name}={value}"
                for name, value in receipt.arguments.items()
                if name not in ("sparsity", "seed") and len(values[receipt.method, name]) > 1
            ]
        )
        for receipt in receipts
    ]


def values_of(receipt: Receipt, label: str, what: str) -> dict[str, float | None]:
    """Return one run's contribution to each column, as fractions."""
    if what == "compressed":
        sizes = receipt.bytes
        return {label: sizes["compressed"] / sizes["dense"] if sizes["compressed"] else None}
    return {"dense": receipt.accuracy["dense"], label: receipt.accuracy[what]}


def table_of(receipts: Sequence[Receipt], what: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the sparsity asked, and a column for the dense network and each method.

    Args:
        receipts: of runs on the same data and model.
        what: a key of TITLES.
    """
    cells: Cells = defaultdict(dict)
    columns: dict[str, None] = {}
    for receipt, label in zip(receipts, labels(receipts), strict=True):
        for column, value in values_of(receipt, label, what).items():
            if value is not None:  # one dense network per seed, however many methods start from it
                row = cells[float(receipt.requested.get("sparsity", 0.0))]
                row.setdefault(column, {})[receipt.seed] = value
                columns[column] = None
    rows = [
        [f"{sparsity:g}", *(describe(list(row.get(column, {}).values())) for column in columns)]
        for sparsity, row in sorted(cells.items())
    ]
    return ["sparsity", *columns], rows


def describe(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" of fractions, in percent; a dash if there are none."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the table in Markdown."""
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, such as multirun or outputs")
    parser.add_argument("--value", choices=TITLES, default="finetuned", help="what the cells show")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    receipts = load(given.folders)
    header, rows = table_of(receipts, given.value)
    seeds = sorted({receipt.seed for receipt in receipts if receipt.seed is not None})
    title = f"{TITLES[given.value]}; mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    console = Console()
    if given.markdown:
        console.print(f"{title}\n\n{markdown(header, rows)}", soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(title=title)
    for column in header:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
