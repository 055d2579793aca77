"""The receipt: counts by hand, a faithful round trip, whole files or none, and plain sentences."""

from __future__ import annotations

import json
import os
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.receipt import (
    NO_PICTURE,
    Receipt,
    expected_kept,
    layer_counts,
    reached_counts,
    versions,
)

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


# counts


def test_layers_are_counted_one_by_one() -> None:
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(3, dtype=torch.bool)}
    assert layer_counts(masks) == [
        {"name": "a", "shape": [2, 2], "kept": 1, "total": 4},
        {"name": "b", "shape": [3], "kept": 3, "total": 3},
    ]


def test_reached_sparsity_is_the_pruned_fraction_of_all_masks() -> None:
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(4, dtype=torch.bool)}
    assert reached_counts(masks, params={"dense": 10, "pruned": 7}) == {
        "sparsity": 3 / 8,
        "kept": 5,
        "total": 8,
        "params": {"dense": 10, "pruned": 7},
        "flops": None,
        "volume": None,
        "channels": None,
    }


def test_without_masks_nothing_is_pruned() -> None:
    reached = reached_counts({})
    assert (reached["sparsity"], reached["kept"], reached["total"]) == (0.0, 0, 0)


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`masks` must be bool tensors, got torch.float32 for 'a'"):
        layer_counts({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [(0.9, 1000, 100), (0.9, 1005, 101), (0.0, 7, 7), (0.29, 100, 71), (0.5, 3, 2), (0.999, 10, 1)],
)
def test_expected_count_rounds_the_pruned_weights_down(sparsity: float, total: int, kept: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point: the 1e-9 makes it 29
    assert expected_kept(sparsity, total) == kept


def test_versions_name_python_and_the_installed_packages() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["torch"], found["lightning"]) == (version("torch"), version("lightning"))
    assert found["lightning_prune"]


# a receipt holds plain values and agrees with itself


def test_a_receipt_survives_the_round_trip_through_json() -> None:
    receipt = filled()
    assert Receipt.from_dict(json.loads(receipt.to_json())) == receipt


def test_the_dictionary_holds_exactly_the_documented_fields() -> None:
    assert list(filled().to_dict()) == [
        "method", "arguments", "seed", "command", "versions", "requested", "reached", "layers", "accuracy",
        "bytes", "milliseconds", "repair", "certificate", "notes",
    ]  # fmt: skip


def test_a_method_alone_makes_a_receipt_with_every_inner_key() -> None:
    values = Receipt(method="SNIP").to_dict()
    assert values["accuracy"] == {"dense": None, "pruned": None, "finetuned": None}
    assert values["bytes"] == {"dense": None, "pruned": None, "compressed": None}
    assert values["milliseconds"] == {"dense": None, "masked": None, "exported": None}
    assert values["reached"] == reached_counts({})


def test_tuples_numpy_floats_and_text_subclasses_become_plain() -> None:
    receipt = filled(arguments={"shape": (1, 2), "rate": np.float64(0.5), "name": np.str_("x")})
    assert json.dumps(receipt.arguments) == '{"shape": [1, 2], "rate": 0.5, "name": "x"}'
    assert type(receipt.arguments["rate"]) is float


def test_the_dictionary_shares_nothing_with_the_receipt() -> None:
    receipt = filled()
    receipt.to_dict()["notes"].append("elsewhere")
    receipt.to_dict()["reached"]["kept"] = 0
    assert receipt == filled()


def test_a_nan_becomes_null_and_a_note_says_so() -> None:
    receipt = filled(accuracy={"dense": float("nan")}, arguments={"limit": float("inf")})
    values = json.loads(receipt.to_json(), parse_constant=pytest.fail)
    assert (values["accuracy"]["dense"], values["arguments"]["limit"]) == (None, None)
    assert values["notes"][1:] == [
        "`arguments.limit` was inf, which JSON has no number for: it is stored as null.",
        "`accuracy.dense` was nan, which JSON has no number for: it is stored as null.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": None}, r"`method` must be str, got None"),
        ({"seed": "7"}, r"`seed` must be int or None, got '7'"),
        ({"notes": "one"}, r"`notes` must be list, got 'one'"),
        ({"notes": [1]}, r"`notes` must be sentences, got 1"),
        ({"arguments": {"at": [torch.zeros(1)]}}, r"`arguments.at\[0\]` must be a plain .*, got Tensor"),
        ({"arguments": {"path": Path("x")}}, r"`arguments.path` must be a plain JSON value, got .*Path"),
        ({"arguments": {1: 2}}, r"`arguments` must have text keys, got 1"),
        ({"accuracy": {"tuned": 1.0}}, r"`accuracy` must hold no key but dense, .*, got \['tuned'\]"),
        ({"accuracy": {"dense": "high"}}, r"`accuracy.dense` must be a number or None, got 'high'"),
        ({"bytes": {"dense": 1.5}}, r"`bytes.dense` must be an int >= 0 or None, got 1.5"),
        ({"milliseconds": {"dense": 3.0}}, r"`milliseconds.dense` must hold low <= .*, got 3.0"),
        ({"milliseconds": {"masked": {"median": 1.0}}}, r"`milliseconds.masked` must hold low <= .*"),
        (
            {"milliseconds": {"masked": {"low": 2.0, "median": 1.0, "high": 3.0}}},
            r"`milliseconds.masked` must hold low <= median <= high",
        ),
        ({"reached": {}}, r"`reached` must count 0 <= kept <= total, got None of None"),
        ({"reached": {"sparsity": 0.0, "kept": 3, "total": 2}}, r"must count 0 <= kept <= total, got 3 of 2"),
        ({"reached": {"sparsity": 0.9, "kept": 1, "total": 2}}, r"= 0.5, got 0.9. Recompute it"),
        (
            {"reached": {"sparsity": 0.5, "kept": 1, "total": 2, "flops": {"dense": 2}}},
            r"`reached.flops` must be \{dense, pruned\} as numbers or None",
        ),
        ({"layers": [{"name": "a"}]}, r"`layers\[0\]` must be \{name, shape, kept, total\}"),
        (
            {"layers": [{"name": "a", "shape": [2], "kept": 3, "total": 2}]},
            r"`layers\[0\]` must count 0 <= kept <= total, got 3 of 2",
        ),
    ],
)  # fmt: skip
def test_a_field_that_breaks_the_rules_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(**change)


def test_a_field_broken_later_is_refused_when_it_is_written(tmp_path: Path) -> None:
    receipt = filled()
    receipt.accuracy["finetuned"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"`accuracy.finetuned` must be a plain JSON value, got Tensor"):
        receipt.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_and_missing_fields_are_both_named() -> None:
    values = filled().to_dict()
    values["speed"] = values.pop("seed")
    with pytest.raises(ValueError, match=r"got unknown \['speed'\] and missing \['seed'\]"):
        Receipt.from_dict(values)


def test_a_receipt_from_something_else_than_a_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="`values` must be a mapping, got list"):
        Receipt.from_dict([])  # type: ignore[arg-type]


# files


def test_three_files_are_saved_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    paths = filled().save(folder)
    assert paths == [folder / name for name in ("receipt.json", "receipt.md", "receipt.png")]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert Receipt.load(paths[0]) == filled()
    assert paths[1].read_text(encoding="utf-8") == filled().to_markdown()
    assert paths[2].read_bytes().startswith(PNG_START)


def test_without_a_picture_an_older_one_does_not_stay_beside_the_new_numbers(tmp_path: Path) -> None:
    filled().save(tmp_path)
    assert [path.name for path in filled().save(tmp_path, picture=False)] == ["receipt.json", "receipt.md"]
    assert not (tmp_path / "receipt.png").exists()
    assert Receipt.load(tmp_path / "receipt.json").notes == ["A first note."]


def test_without_matplotlib_a_note_replaces_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    receipt = filled()
    receipt.save(tmp_path)
    paths = receipt.save(tmp_path)
    assert [path.name for path in paths] == ["receipt.json", "receipt.md"]
    assert Receipt.load(paths[0]).notes == ["A first note.", NO_PICTURE]
    assert NO_PICTURE in paths[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(seed=1).save(tmp_path, picture=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    def refuse(source: object, target: object) -> None:
        raise OSError("disk full")

    if failing == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        filled(seed=2).save(tmp_path, picture=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_leaves_the_random_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    filled().save(tmp_path)
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("content", [b"{ not json", b"\xff\xfe", b"[1, 2]", b'{"method": "CHITA"}'])
def test_an_unreadable_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a receipt in JSON, got '.*broken\.json'"):
        Receipt.load(path)


def test_a_missing_file_is_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Receipt.load(tmp_path / "nowhere.json")
