"""What a receipt may hold: plain JSON values under known keys, and counts that agree with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COSTS = ("params", "flops", "volume", "channels")
_KEYS = {
    "reached": ("sparsity", "kept", "total", *COSTS),
    "accuracy": ("dense", "pruned", "finetuned"),
    "bytes": ("dense", "pruned", "compressed"),
    "milliseconds": ("dense", "masked", "exported"),
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("arguments", "versions", "requested", *_KEYS), (dict,)),
    **dict.fromkeys(("layers", "notes"), (list,)),
    "method": (str,),
    "seed": (int, type(None)),
    "command": (str, type(None)),
}


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a receipt as fresh plain JSON values, None for inner keys that are missing.

    Args:
        values: every field of a receipt by name.

    Raises:
        ValueError: if a value is no plain JSON, has the wrong kind or an unknown key, or contradicts another.
    """
    result = {name: plain(value, name) for name, value in values.items()}
    for name, kinds in _KINDS.items():
        if not isinstance(result[name], kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"`{name}` must be {wanted}, got {result[name]!r}. See the fields of Receipt.")
    for name, keys in _KEYS.items():
        result[name] = _complete(name, result[name], keys)
    _check_reached(result["reached"])
    _check_layers(result["layers"])
    _check_measures(result)
    return result


def plain(value: Any, where: str) -> Any:
    """Copy a value into dict, list, str, int, float, bool and None; `where` names it in the error."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain_key(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(
        f"`{where}` must be a plain JSON value, got {type(value).__name__}. Convert it to a number or text."
    )


def _plain_key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"`{where}` must have text keys, got {key!r}. Convert the key with `str`.")
    return str.__str__(key)


def finite(value: Any, where: str, lost: list[str]) -> Any:
    """Copy a plain value with None for every nan and infinity; a sentence on each goes to `lost`."""
    if isinstance(value, dict):
        return {key: finite(item, f"{where}.{key}", lost) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item, f"{where}[{index}]", lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"`{where}` was {value}, which JSON has no number for: it is stored as null.")
        return None
    return value


def _complete(name: str, value: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping with exactly these keys, None where one was missing."""
    unknown = sorted(set(value) - set(keys))
    if unknown:
        raise ValueError(f"`{name}` must hold no key but {', '.join(keys)}, got {unknown}. Say the rest in `notes`.")
    return {key: value.get(key) for key in keys}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_timing(value: Any) -> bool:
    times: list[Any] = [value.get(name) for name in ("low", "median", "high")] if isinstance(value, dict) else []
    return len(times) == 3 and all(map(_is_number, times)) and times[0] <= times[1] <= times[2]


def _check_kept(where: str, kept: Any, total: Any) -> None:
    if not (_is_count(kept) and _is_count(total) and kept <= total):
        raise ValueError(
            f"`{where}` must count 0 <= kept <= total, got {kept!r} of {total!r}. Count with `layer_counts`."
        )


def _check_reached(reached: dict[str, Any]) -> None:
    kept, total, sparsity = reached["kept"], reached["total"], reached["sparsity"]
    _check_kept("reached", kept, total)
    true = (total - kept) / total if total else 0.0
    if not _is_number(sparsity) or not abs(sparsity - true) <= 1e-9:
        raise ValueError(f"`reached.sparsity` must be (total - kept) / total = {true}, got {sparsity!r}. Recompute it.")
    for name in COSTS:
        cost = reached[name]
        if cost is not None and not (
            isinstance(cost, dict) and set(cost) == {"dense", "pruned"} and all(map(_is_number, cost.values()))
        ):
            raise ValueError(
                f"`reached.{name}` must be {{dense, pruned}} as numbers or None, got {cost!r}. Count both."
            )


def _check_layers(layers: list[Any]) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, dict) or set(layer) != {"name", "shape", "kept", "total"}:
            raise ValueError(
                f"`layers[{index}]` must be {{name, shape, kept, total}}, got {layer!r}. Use `layer_counts`."
            )
        _check_kept(f"layers[{index}]", layer["kept"], layer["total"])


def _check_measures(values: dict[str, Any]) -> None:
    for key, value in values["accuracy"].items():
        if value is not None and not _is_number(value):
            raise ValueError(f"`accuracy.{key}` must be a number or None, got {value!r}. Give `float(metric)`.")
    for key, value in values["bytes"].items():
        if value is not None and not _is_count(value):
            raise ValueError(f"`bytes.{key}` must be an int >= 0 or None, got {value!r}. Give the size of the file.")
    for key, value in values["milliseconds"].items():
        if value is not None and not _is_timing(value):
            raise ValueError(
                f"`milliseconds.{key}` must hold low <= median <= high or be None, got {value!r}. Measure it."
            )
    for note in values["notes"]:
        if not isinstance(note, str):
            raise ValueError(f"`notes` must be sentences, got {note!r}. Give text.")
