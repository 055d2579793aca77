"""SynFlow: prune without data by iterated synaptic flow.

Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, equation 2 and algorithm 1.

R is the sum of the outputs for one input of ones, in a network whose parameters are replaced by their absolute values.
A weight's flow is |dR/dw| * |w|; the flows of a layer without a bias add up to R, so that no layer is emptied if the
network is pruned in many rounds.

Departures from the authors' program: double precision by default (products over deep networks overflow); buffers are
made positive too, and norms run in evaluation mode; exactly k weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.batches import map_batch
from lightning_prune.channels import Arguments, forward_arguments
from lightning_prune.checks import check_choice, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import full
from lightning_prune.methods._prospr_batches import progress
from lightning_prune.methods._prospr_selection import InitialPruning, Masks, prune_in_rounds
from lightning_prune.objective import buffers_of, live_names
from lightning_prune.sandbox import untouched
from lightning_prune.selection import Scope
from lightning_prune.targets import canonical_name

__all__ = ["SynFlow", "positive_flow", "synflow_scores"]

Flow = Callable[[Mapping[str, Tensor]], Tensor]
_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_NORMALIZING = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def synflow_scores(
    flow: Flow, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Score every weight by its synaptic flow |dR/dw| * |w|.

    Args:
        flow: R as a function of the weights' absolute values by name, a scalar.
        weights: w by name, each of any shape S.
        masks: bool masks of shape S; a masked weight is 0. None masks nothing.
    Returns:
        scores >= 0 by name, of shape S and of the weights' dtype.
    """
    masked = weights if masks is None else {name: weight * masks[name] for name, weight in weights.items()}
    leaves = {name: weight.detach().abs().requires_grad_() for name, weight in masked.items()}
    slopes = torch.autograd.grad(flow(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: slope.abs() * leaves[name].detach() for name, slope in zip(leaves, slopes, strict=True)}


@contextmanager
def positive_flow(module: nn.Module, arguments: Arguments, dtype: torch.dtype = torch.float64) -> Iterator[Flow]:
    """Yield R: the sum of the outputs of `module` in evaluation mode with positive parameters, for an input of ones.

    Args:
        module: any module; it is left as it was.
        arguments: (args, kwargs) of one forward call; only their shapes and types are used.
        dtype: of the computation.
    """
    wrapper = _Forward(module)
    names = {canonical_name(name): name for name, _ in wrapper.named_parameters()}
    constants = {name: _positive(full(p.detach()), dtype) for name, p in wrapper.named_parameters()}
    constants.update({f"module.{name}": _positive(buffer, dtype) for name, buffer in buffers_of(module).items()})
    device = next(iter(constants.values())).device
    args, kwargs = _ones(arguments[0], dtype, device), _ones(arguments[1], dtype, device)
    with untouched(module), torch.compiler.set_stance("force_eager"):
        module.eval()

        def flow(weights: Mapping[str, Tensor]) -> Tensor:
            given = {**constants, **{names[f"module.{name}"]: weight for name, weight in weights.items()}}
            output = torch.func.functional_call(wrapper, live_names(wrapper, given), args, kwargs, tie_weights=False)
            return torch.stack([tensor.sum() for tensor in _floating(output)]).sum()

        yield flow


class _Forward(nn.Module):
    """Calls a module's forward without the hooks on it, which are not meant to see an input of ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _positive(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).abs() if tensor.is_floating_point() else tensor.clone()


def _ones(tree: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The tree with every tensor replaced by ones, one sample long."""

    def ones(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.ones((1, *tensor.shape[1:]) if tensor.dim() else (), dtype=kind, device=device)

    return map_batch(tree, ones)


def _floating(tree: Any) -> list[Tensor]:
    """All floating tensors in a tree of outputs."""
    found: list[Tensor] = []
    map_batch(tree, lambda tensor: found.append(tensor) if tensor.is_floating_point() else None)  # type: ignore
    if not found:
        raise ValueError(f"SynFlow needs a forward that returns floating tensors, got {type(tree).__name__}.")
    return found


class SynFlow(InitialPruning):
    """Remove the weights with the least synaptic flow, in many rounds, without data.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        rounds: times the masked network is scored, on an exponential schedule, >= 1.
        at: when; see `OneShotPruning`.
        input_shape: shape of one input without the batch, such as (1, 28, 28); None takes it from the module's
            `example_input_array`, else from the first training batch (its shape only).
        dtype: "float64", or "float32" where the device or the module cannot do better.
        **initial: see `InitialPruning`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "synflow"

    def __init__(
        self,
        sparsity: float | None = None,
        rounds: int = 100,
        at: Any = "start",
        input_shape: Sequence[int] | None = None,
        dtype: str = "float64",
        scope: Scope = "global",
        min_keep_per_layer: int = 1,
        shuffle_within_layer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, scope, min_keep_per_layer, shuffle_within_layer, **common)
        self.rounds = check_integer("rounds", rounds, 1)
        self.input_shape = (
            None if input_shape is None else tuple(check_integer("input_shape", size, 1) for size in input_shape)
        )
        self.dtype = check_choice("dtype", dtype, tuple(_DTYPES))

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest flows, round by round."""
        dtype = _DTYPES[self.dtype]
        weights = {name: weight.to(dtype) for name, weight in context.weights.items()}
        with (
            progress("SynFlow", self.rounds, context.show_progress) as advance,
            positive_flow(context.module, self._arguments(context), dtype) as flow,
        ):

            def score(masks: Masks) -> Masks:
                advance()
                return synflow_scores(flow, weights, masks)

            masks = prune_in_rounds(score, self.keep, context.alive, context.target, self.rounds)
        _warn_of_norms(context.module)
        masks, notes = self.settle(masks, context.alive, context.generator)
        return Proposal(masks, notes=notes)

    def _arguments(self, context: Context) -> Arguments:
        if self.input_shape is not None:
            return (torch.ones(1, *self.input_shape),), {}
        return context.example if context.example is not None else forward_arguments(context, " Give `input_shape`.")


def _warn_of_norms(module: nn.Module) -> None:
    names = [name for name, child in module.named_modules() if isinstance(child, _NORMALIZING)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        rank_zero_warn(
            f"SynFlow does not conserve flow through {', '.join(names[:3])}{more}: these norms rescale their input in "
            "evaluation too, so a layer may be emptied. `min_keep_per_layer` guards against it."
        )
