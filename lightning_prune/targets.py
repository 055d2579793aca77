"""Which tensors may be pruned: by module type and name patterns.

By default the `weight` of Linear, Conv1-3d, ConvTranspose1-3d and transformers' Conv1D; no bias, norm or embedding. Tensors
are chosen by module type and name, never by `requires_grad`: a backbone that is frozen today is trained tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

PRUNABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_SEEN_LIMIT = 40


def canonical_name(name: str) -> str:
    """Return a parameter or module name without the `_orig_mod.` parts that `torch.compile` inserts."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


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
    items = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"`{name}` must hold names or patterns such as 'encoder.*', got {items!r}.")
    return tuple(str(item) for item in items)


def select(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
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
            (lazy, parametrized, weight-normed, pruned by torch.nn.utils.prune, integer).
    """
    names = _names_by_parameter(module)
    default = _default_parameters(module)
    _refuse_hidden_weights(module, include, exclude)
    chosen = dict.fromkeys(default) if include is None else {}
    for pattern in include or ():
        found = [
            key
            for key, every in names.items()
            if _matches(pattern, every) and (key in default or pattern in every)
        ]
        if not found:
            raise ValueError(_no_match("include", pattern, default))
        chosen.update(dict.fromkeys(found))
    for pattern in exclude:
        found = [key for key, every in names.items() if _matches(pattern, every)]
        if not found:
            raise ValueError(_no_match("exclude", pattern, default))
        for key in found:
            chosen.pop(key, None)
    parameters = named_tensors(module)
    selected = {name: parameter for name, parameter in parameters.items() if name in chosen}
    if not selected:
        raise ValueError(
            f"nothing to prune: `include`={include!r} and `exclude`={tuple(exclude)!r} leave no tensor. {_seen(default)}"
        )
    for name, parameter in selected.items():
        _check_maskable(name, parameter)
    return selected


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


def _refuse_hidden_weights(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Raise for prunable modules whose weight is not a plain parameter, unless the patterns leave them out."""
    for path, child in module.named_modules():
        if not isinstance(child, PRUNABLE):
            continue
        name = canonical_name(f"{path}.weight" if path else "weight")
        wanted = (include is None or any(_matches(p, [name]) for p in include)) and not any(
            _matches(p, [name]) for p in exclude
        )
        if not wanted:
            continue
        hidden, remedy = _hidden_weight(child)
        if hidden:
            raise ValueError(
                f"{name!r} cannot be pruned: {hidden}. {remedy} or leave it out with exclude=[{path!r}]."
            )


def _hidden_weight(child: nn.Module) -> tuple[str, str]:
    own = dict(child.named_parameters(recurse=False))
    if parametrize.is_parametrized(child, "weight"):
        return (
            "it is parametrized",
            "Call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first",
        )
    if "weight_orig" in own:
        return (
            "it carries masks of torch.nn.utils.prune or a spectral norm",
            "Call the matching remove function first",
        )
    if "weight_v" in own:
        return (
            "it is weight-normed (a masked row of v makes the weight NaN)",
            "Call torch.nn.utils.remove_weight_norm first",
        )
    return "", ""


def _check_maskable(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"{name!r} is lazy and has no shape yet. Run one forward pass before pruning.")
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name!r} has dtype {parameter.dtype}; only floating tensors can be pruned. Leave it out with `exclude`."
        )
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
