"""Which tensors may be pruned: by module type and name patterns.

By default the `weight` of Linear, Conv1-3d, ConvTranspose1-3d and transformers' Conv1D; no bias, norm or embedding.
Tensors are chosen by module type and name, never by `requires_grad`: a backbone frozen today is trained tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PRUNABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
MASKABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_SEEN_LIMIT = 40


def canonical_name(name: str) -> str:
    """Return a parameter or module name without the `_orig_mod.` parts that `torch.compile` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by canonical name, a tied tensor once, under its first name."""
    return {canonical_name(name): parameter for name, parameter in module.named_parameters()}


def aliases(module: nn.Module) -> dict[str, str]:
    """Return every canonical name of every parameter -> its first name (tied tensors have several)."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        name = canonical_name(name)
        names[name] = first.setdefault(id(parameter), name)
    return names


def check_patterns(name: str, patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Return `patterns` as a tuple of strings (one string counts as one pattern); None stays None."""
    if patterns is None:
        return None
    items: tuple[Any, ...] = (
        tuple(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else (patterns,)
    )
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"`{name}` must hold names or patterns such as 'encoder.*', got {items!r}.")
    return tuple(str(item) for item in items)


def select(
    module: nn.Module, include: Sequence[str] | str | None = None, exclude: Sequence[str] | str = ()
) -> dict[str, nn.Parameter]:
    """Return the prunable parameters of `module` by canonical name, in the order of `named_parameters`.

    A pattern is a shell pattern (`*`, `?`, `[...]`) or a plain name. It matches a parameter by any of its names
    ("encoder.fc.weight") or by a module above it ("encoder", "*.fc"). Patterns in `include` choose among the default
    tensors; a plain parameter name adds any floating tensor (an embedding, a bias).

    Args:
        module: any module whose parameters exist (no lazy ones among those selected).
        include: what may be pruned; None means every default tensor.
        exclude: what may not, taken away last.
    Raises:
        ValueError: a pattern matches nothing, nothing is left, or a selected tensor cannot carry a mask
            (lazy, parametrized, weight-normed, pruned by torch.nn.utils.prune, quantized, integer).
    """
    names = _names_by_parameter(module)
    hidden, sources = _hidden_weights(module), _source_parameters(module)
    names.update({name: [name] for name in hidden})
    default = _default_parameters(module)
    eligible = {*default, *hidden}
    included, excluded = _normalized("include", include), _normalized("exclude", exclude) or ()
    chosen = dict.fromkeys([*default, *hidden]) if included is None else {}
    for pattern in included or ():
        found = [key for key in _found(pattern, names) if key in eligible or pattern in names[key]]
        if not found:
            raise ValueError(_no_match("include", pattern, default))
        chosen.update(dict.fromkeys(found))
    for pattern in excluded:
        found = _found(pattern, names)
        if not found:
            raise ValueError(_no_match("exclude", pattern, default))
        for key in found:
            chosen.pop(key, None)
    for name in chosen:
        reason = hidden.get(name) or sources.get(name)
        if reason:
            raise ValueError(f"{name!r} cannot be pruned: {reason} or leave it out with exclude=[{name!r}].")
    selected = {name: parameter for name, parameter in named_tensors(module).items() if name in chosen}
    if not selected:
        raise ValueError(
            f"nothing to prune: `include`={included!r} and `exclude`={excluded!r} leave no tensor. {_seen(default)}"
        )
    for name, parameter in selected.items():
        _check_maskable(name, parameter)
    return selected


def _normalized(argument: str, patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Patterns as `check_patterns` gives them, without the `_orig_mod.` that users copy from a compiled module."""
    checked = check_patterns(argument, patterns)
    return None if checked is None else tuple(canonical_name(pattern) for pattern in checked)


def _found(pattern: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    return [key for key, every in names.items() if _matches(pattern, every)]


def _names_by_parameter(module: nn.Module) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for alias, first in aliases(module).items():
        names.setdefault(first, []).append(alias)
    return names


def _default_parameters(module: nn.Module) -> list[str]:
    """First names of all default tensors; one that is also an embedding's is left out."""
    first = aliases(module)
    chosen, embedded = [], set()
    for path, child in module.named_modules(remove_duplicate=False):
        name = first.get(canonical_name(f"{path}.weight" if path else "weight"))
        if name is None:
            continue
        if isinstance(child, EMBEDDINGS):
            embedded.add(name)
        elif isinstance(child, PRUNABLE) or _is_transformers_conv1d(child):
            chosen.append(name)
    return [name for name in dict.fromkeys(chosen) if name not in embedded]


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether the pattern matches one of a parameter's names or the path of a module above it."""
    for name in names:
        parts = name.split(".")
        if any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1)):
            return True
    return False


def _hidden_weights(module: nn.Module) -> dict[str, str]:
    """Names of prunable modules' weights that are not plain parameters -> why and what to do."""
    hidden = {}
    for path, child in module.named_modules():
        reason = _hidden_reason(child)
        if reason:
            hidden[canonical_name(f"{path}.weight" if path else "weight")] = reason
    return hidden


def _hidden_reason(child: nn.Module) -> str:
    if ".nn.quantized." in type(child).__module__ and type(child).__name__.startswith(("Linear", "Conv")):
        return "it is quantized. Prune before quantizing"
    if not isinstance(child, PRUNABLE) and not _is_transformers_conv1d(child):
        return ""
    if parametrize.is_parametrized(child, "weight"):
        return "it is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    if "weight_orig" in child._parameters:
        return "it carries masks of torch.nn.utils.prune or a spectral norm. Call the matching remove function first"
    if "weight_v" in child._parameters:
        return (
            "it is weight-normed (a masked row of v makes the weight NaN). Call torch.nn.utils.remove_weight_norm first"
        )
    return ""


def _source_parameters(module: nn.Module) -> dict[str, str]:
    """Names of the parameters that other weights are computed from -> why and what to do."""
    reason = "another tensor is computed from it (a parametrization, a norm or a mask). Remove that first"
    return {
        canonical_name(f"{path}.{leaf}" if path else leaf): reason
        for path, child in module.named_modules()
        for leaf in child._parameters
        if isinstance(child, parametrize.ParametrizationList) or _is_source(child, leaf)
    }


def _is_source(child: nn.Module, leaf: str) -> bool:
    """Whether torch.nn.utils.prune or an older norm computes `weight` from `weight_orig` or `weight_g`, `weight_v`."""
    base, _, suffix = leaf.rpartition("_")
    return suffix in ("orig", "g", "v") and isinstance(child.__dict__.get(base), Tensor)


def _check_maskable(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name!r} is lazy and has no shape yet. Run one forward pass before pruning.")
    packed = is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "device_mesh")  # but DTensor
    if parameter.dtype not in MASKABLE or packed:
        raise ValueError(
            f"{name!r} is a {type(parameter).__name__} of dtype {parameter.dtype}; only plain tensors of 16, 32 or 64 "
            "bit floats can be pruned. Prune before quantizing, or leave it out with `exclude`."
        )
    if parameter.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values. Materialize the module first.")
    if parameter.numel() == 0:
        raise ValueError(f"{name!r} has no entries. Leave it out with `exclude`.")


def _no_match(argument: str, pattern: str, default: Sequence[str]) -> str:
    return f"`{argument}` pattern {pattern!r} matches no prunable tensor. {_seen(default)}"


def _seen(default: Sequence[str]) -> str:
    more = f" and {len(default) - _SEEN_LIMIT} more" if len(default) > _SEEN_LIMIT else ""
    listed = ", ".join(default[:_SEEN_LIMIT]) or "none (no Linear or convolution)"
    return f"Prunable tensors seen: {listed}{more}."


def pick(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the entries of `tensors` under `names`, in the order of `names`."""
    return {name: tensors[name] for name in names}
