"""How a receipt reads and looks: tables, Markdown, plain sentences and the picture."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from lightning_prune import _receipt_views as views
from lightning_prune.receipt import Receipt, honest_notes, layer_counts, reached_counts

ZEROS = "Zeros in dense tensors do not make this model faster."
PNG_START = b"\x89PNG"


def timing(median: float) -> dict[str, Any]:
    return {
        "median": median,
        "low": median / 2,
        "high": median * 2,
        "batch_size": 64,
        "threads": 2,
        "repeats": 30,
    }


def filled(**changes: Any) -> Receipt:
    """A receipt of 1,000 selected weights in a model of 1,100, with 100 kept."""
    masks = {"net.0.weight": torch.arange(600) < 60, "net.1.weight": (torch.arange(400) < 40).view(20, 20)}
    values: dict[str, Any] = {
        "method": "CHITA",
        "arguments": {"sparsity": 0.9, "include": ["*"], "at": None},
        "seed": 7,
        "command": "lightning-prune pruning=chita",
        "versions": {"python": "3.11.0"},
        "requested": {"sparsity": 0.9},
        "reached": reached_counts(
            masks,
            params={"dense": 1100, "pruned": 200},
            flops={"dense": 5000, "pruned": 5000},
        ),
        "layers": layer_counts(masks),
        "accuracy": {"dense": 0.98, "pruned": 0.7512, "finetuned": 0.97},
        "bytes": {"dense": 4464, "pruned": 4464, "compressed": 912},
        "milliseconds": {"dense": timing(1.5), "masked": timing(1.25), "exported": None},
        "repair": {"batchnorm": True},
        "certificate": {"epsilon": 0.1},
        "notes": ["A first note."],
    }
    return Receipt(**{**values, **changes})


def printed(receipt: Receipt, **options: Any) -> str:
    stream = StringIO()
    receipt.show(Console(file=stream, width=120), **options)
    return stream.getvalue()


def cells(receipt: Receipt) -> dict[str, list[str]]:
    """The main table as the Markdown states it: label -> dense, pruned, fine-tuned."""
    rows = [line.strip("| ").split(" | ") for line in receipt.to_markdown().splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) == 4}


# tables


def test_the_main_table_states_dense_pruned_and_finetuned() -> None:
    table = cells(filled())
    assert table["accuracy"] == ["0.9800", "0.7512", "0.9700"]
    assert table["weights kept"] == ["1,000", "100", "100"]
    assert table["sparsity, selected"] == ["0.0000", "0.9000", "0.9000"]
    assert table["sparsity, whole model"] == ["0.0000", "0.8182", "0.8182"]  # 1 - 200 / 1100
    assert table["bytes on disk"] == ["4,464", "4,464", "4,464"]
    assert table["bytes compressed"] == ["–", "–", "912"]  # noqa: RUF001
    assert table["FLOPs"] == ["5,000", "5,000", "5,000"]
    assert table["ms per batch of 64"] == ["1.5 [0.75–3]", "1.25 [0.625–2.5]", "1.25 [0.625–2.5]"]  # noqa: RUF001


def test_without_finetuning_its_column_is_empty() -> None:
    table = cells(filled(accuracy={"dense": 0.98, "pruned": 0.7512}))
    assert {row[2] for row in list(table.values())[2:]} == {"–"}  # noqa: RUF001
    assert table["bytes compressed"][1] == "912"


def test_missing_values_show_as_an_en_dash() -> None:
    table = cells(Receipt(method="SNIP"))
    for label in ("accuracy", "sparsity, whole model", "bytes on disk", "bytes compressed", "FLOPs", "ms"):
        assert table[label] == ["–"] * 3  # noqa: RUF001


def test_channels_volume_and_exported_times_show_where_they_are_known() -> None:
    reached = {
        **filled().reached,
        "channels": {"dense": 32, "pruned": 20},
        "volume": {"dense": 900, "pruned": 450},
    }
    table = cells(filled(reached=reached, milliseconds={"exported": timing(2000.0)}))
    assert table["channels"] == ["32", "20", "20"]
    assert table["activation volume"] == ["900", "450", "450"]
    assert table["ms, exported"][1] == "2,000 [1,000–4,000]"  # noqa: RUF001


@pytest.mark.parametrize(
    ("requested", "line"),
    [
        ({"sparsity": 0.9}, "CHITA: asked for sparsity 0.9, got 0.9"),
        ({"sparsity": 0.9, "events": [{"sparsity": 0.9}]}, "CHITA: asked for sparsity 0.9, got 0.9"),
        (
            {"budget": 0.5, "budget_type": "params"},
            "CHITA: asked for at most 0.5 of the parameters, got 0.181818",
        ),
        (
            {"budget": 0.5, "budget_type": "volume"},
            "CHITA: asked for at most 0.5 of the activation volume, got sparsity 0.9",
        ),
        ({"penalty": 0.01, "sparsity": None}, "CHITA: asked for penalty 0.01, got sparsity 0.9"),
        ({}, "CHITA: asked for no target, got sparsity 0.9"),
    ],
)
def test_the_title_says_what_was_asked_and_what_was_got(requested: dict[str, Any], line: str) -> None:
    receipt = filled(requested=requested)
    assert receipt.to_markdown().splitlines()[0] == f"# {line}"
    assert str(receipt.to_table().title) == line


def test_the_terminal_shows_table_and_notes_and_layers_when_asked() -> None:
    text = printed(filled())
    assert "fine-tuned" in text
    assert "- A first note." in text
    assert "net.1.weight" not in text
    assert "20 x 20" in printed(filled(), layers=True)


def test_the_layer_table_states_counts_and_sparsity() -> None:
    assert views.layer_rows(filled()) == [
        ("net.0.weight", "600", "60", "600", "0.9000"),
        ("net.1.weight", "20 x 20", "40", "400", "0.9000"),
    ]


def test_square_brackets_in_names_are_printed_as_they_are() -> None:
    layers = [{"name": "net[bold].weight", "shape": [2], "kept": 1, "total": 2}]
    text = printed(filled(method="My[red]Method", layers=layers, notes=["see [link]"]), layers=True)
    assert all(name in text for name in ("My[red]Method", "net[bold].weight", "see [link]"))


def test_the_markdown_holds_layers_notes_command_and_versions() -> None:
    text = filled(notes=["a|b"]).to_markdown()
    assert "| net.1.weight | 20 x 20 | 40 | 400 | 0.9000 |" in text
    assert "- a\\|b\n" in text
    assert "```shell\nlightning-prune pruning=chita\n```" in text
    assert "Seed 7. python 3.11.0." in text


# notes


def test_a_target_met_to_the_weight_is_said_to_be_exact() -> None:
    start = "Asked for sparsity 0.9, got 0.9: 100 of 1,000 selected weights are kept"
    assert honest_notes(filled())[0] == f"{start}, exactly the count the target sets."


def test_a_missed_target_is_stated_in_words_with_its_reason() -> None:
    receipt = filled(requested={"sparsity": 0.85})
    start = "Asked for sparsity 0.85, got 0.9: 100 of 1,000 selected weights are kept where the target leaves 150"
    assert honest_notes(receipt)[0] == f"{start}."
    reason = "earlier masks had already removed more"
    assert honest_notes(receipt, reason)[0] == f"{start}, because {reason}."


@pytest.mark.parametrize(("budget", "verdict"), [(0.2, "within"), (0.1, "above")])
def test_a_budget_is_compared_with_the_share_that_is_left(budget: float, verdict: str) -> None:
    note = honest_notes(filled(requested={"budget": budget, "budget_type": "params"}))[0]
    assert note == (f"Asked for at most {budget} of the parameters, got 0.181818 (200 of 1,100): {verdict} the budget.")


def test_zeros_without_structure_are_said_to_save_no_time() -> None:
    assert ZEROS in honest_notes(filled())
    assert ZEROS in honest_notes(filled(reached={**filled().reached, "flops": None}))


def test_a_model_that_lost_channels_is_not_said_to_be_as_slow_as_before() -> None:
    fewer = {"dense": 5000, "pruned": 900}
    assert ZEROS not in honest_notes(filled(reached={**filled().reached, "flops": fewer}))
    assert ZEROS not in honest_notes(filled(reached={**filled().reached, "flops": None, "channels": fewer}))


def test_an_unpruned_model_has_no_zeros_to_speak_of() -> None:
    assert ZEROS not in honest_notes(filled(reached=reached_counts({"a": torch.ones(2, dtype=torch.bool)})))


def test_measured_medians_are_stated_with_their_conditions() -> None:
    sentence = "Measured medians per batch of 64 on 2 threads: dense 1.5 ms, masked 1.25 ms."
    assert sentence in honest_notes(filled())
    assert not any("medians" in note for note in honest_notes(filled(milliseconds={})))


def test_a_compressed_size_left_out_is_mentioned() -> None:
    sentence = "The compressed size was not measured."
    assert sentence in honest_notes(filled(bytes={"dense": 1, "pruned": 1}))
    assert sentence not in honest_notes(filled())
    assert sentence not in honest_notes(filled(bytes={}))


def test_asking_for_notes_changes_nothing() -> None:
    receipt = filled()
    honest_notes(receipt)
    assert receipt == filled()


# picture


@pytest.mark.parametrize("count", [0, 1, 60, 75])
def test_any_number_of_layers_is_drawn_in_at_most_sixty_bars(count: int) -> None:
    layers = [
        {"name": f"backbone.encoder.{index}.attention.query.projection.weight", "shape": [index], "kept": 1,
         "total": index + 1}
        for index in range(count)
    ]  # fmt: skip
    bars = views.layer_bars(layers)
    assert len(bars) == min(count, 60)
    assert len({label for label, *_ in bars}) == len(bars)
    assert all(len(label) <= 34 for label, *_ in bars)
    assert views.png(filled(layers=layers)).startswith(PNG_START)


def test_the_smallest_layers_share_the_last_bar() -> None:
    layers = [{"name": str(total), "shape": [total], "kept": 1, "total": total} for total in range(1, 63)]
    label, length, text, _ = views.layer_bars(layers)[-1]
    # the three smallest of 62 layers: 1 + 2 + 3 weights, one kept in each
    assert (label, length, text) == ("3 smaller layers", 0.5, "3 of 6")


def test_a_long_name_loses_its_middle() -> None:
    assert views.shorten("abcdefghij", 5) == "ab…ij"
    assert views.shorten("abcdefghij", 6) == "abc…ij"
    assert views.shorten("abcde", 5) == "abcde"


def test_a_picture_of_an_empty_receipt_and_of_a_nan_is_drawn() -> None:
    assert views.png(Receipt(method="SNIP")).startswith(PNG_START)
    assert views.png(filled(accuracy={"dense": float("nan"), "pruned": -1.0})).startswith(PNG_START)


def test_the_picture_leaves_the_global_state_of_matplotlib_alone() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    settings, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    assert views.png(filled()).startswith(PNG_START)
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == loaded
