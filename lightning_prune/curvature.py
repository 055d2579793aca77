"""Losses along a path of parameters: their gradients and Hessian-vector products, with noise and buffers replayed.

A method that looks at training itself (meta-gradients, gradient flow) evaluates one batch at several parameters and
one step several times. Here a step t keeps its batch, its random seed and the buffers it met first, so that every
evaluation of it is the same function of the parameters. Second derivatives are exact products H v, never differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune.batches import batch_length, map_batch, slice_batch
from lightning_prune.checks import check_choice
from lightning_prune.masks import full
from lightning_prune.objective import Objective, buffers_of, evaluate
from lightning_prune.sandbox import seed_all
from lightning_prune.targets import named_tensors

Parameters = Mapping[str, Tensor]
Part = Callable[[Parameters], Tensor]

BACKENDS = ("reverse_over_reverse", "forward_over_reverse")
_NOISE_STRIDE = 1_000_003  # noise of step t, slice i: seed + t * stride + i
_ONCE = "torch::autograd::Error"  # autograd's node for a gradient that may not be differentiated again
_SAMPLE_STRIDE = 15_485_863  # between the seeds of successive lists of batches


@dataclass
class Losses:
    """A sequence of losses L_0, L_1, ... of the same parameters, each a sum of parts held one at a time.

    Attributes:
        parts: step t -> functions of the parameters whose sum is L_t, a scalar each; equal whenever they are called.
        reduce: returns the mean of a tensor over all ranks; identity on one process.
        backend: how H v is made: "reverse_over_reverse" (two backward passes) or "forward_over_reverse" (a dual number
            through one); equal numbers, but the second needs forward derivatives of every backward.
        advance: called after every gradient and every product, for progress bars.
    """

    parts: Callable[[int], Sequence[Part]]
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    backend: str = "reverse_over_reverse"
    advance: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)

    def gradient(
        self, step: int, parameters: Parameters, wanted: Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_t and its gradient.

        Args:
            step: t, >= 0.
            parameters: point of evaluation, by name.
            wanted: names to differentiate by; None takes all.
        Returns:
            the loss (scalar, detached) and gradients by name, zero where the loss does not depend on a parameter.
        """
        leaves = _leaves(parameters)
        names = list(leaves) if wanted is None else list(wanted)
        value: Any = 0.0
        total: list[Tensor] = []
        for part in self.parts(step):
            loss = part(leaves)
            grads = _gradients([loss], [leaves[name] for name in names])
            value = value + loss.detach()
            total = list(torch._foreach_add(total, grads)) if total else grads
            del loss
        self.advance()
        return self.reduce(value), dict(zip(names, map(self.reduce, total), strict=True))

    def product(
        self, step: int, parameters: Parameters, vector: Parameters, wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return rows of H_t a, the Hessian of L_t at `parameters` times a vector.

        Args:
            step: t, >= 0.
            parameters: point of evaluation, by name.
            vector: a by name, each of its parameter's shape; parameters left out have a = 0.
            wanted: names whose rows are returned; None takes all.
        Returns:
            (H_t a) by name, zero where there is no second derivative.
        Raises:
            ValueError: an operation of the module has no second derivative.
        """
        names = list(parameters) if wanted is None else list(wanted)
        apply = _reverse_product if self.backend == "reverse_over_reverse" else _forward_product
        total: list[Tensor] = []
        for part in self.parts(step):
            try:
                rows = apply(part, parameters, vector, names)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                other = "backend='reverse_over_reverse' or " if self.backend == "forward_over_reverse" else ""
                raise ValueError(
                    f"the second derivative of the loss cannot be computed ({type(error).__name__}: {error}). "
                    f"Use {other}mode='first_order', which needs none."
                ) from error
            total = list(torch._foreach_add(total, rows)) if total else rows
        self.advance()
        return dict(zip(names, map(self.reduce, total), strict=True))


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=True, **options))


def _reverse_product(part: Part, parameters: Parameters, vector: Parameters, names: Sequence[str]) -> list[Tensor]:
    leaves = _leaves(parameters)
    slopes = _gradients([part(leaves)], [leaves[name] for name in vector], create_graph=True)
    pairs = [(slope, vector[name]) for slope, name in zip(slopes, vector, strict=True) if slope.requires_grad]
    _refuse_dead_ends([slope for slope, _ in pairs])
    if not pairs:  # the loss is linear in these parameters
        return [torch.zeros_like(parameters[name]) for name in names]
    return _gradients([s for s, _ in pairs], [leaves[n] for n in names], grad_outputs=[a for _, a in pairs])


def _refuse_dead_ends(slopes: Sequence[Tensor]) -> None:
    """Raise where a backward is marked as differentiable once: asked for some inputs only, autograd would skip it."""
    if any(node.name() == _ONCE for node in graph_nodes(slopes)):
        raise NotImplementedError("a backward is marked with @once_differentiable")


def _forward_product(part: Part, parameters: Parameters, vector: Parameters, names: Sequence[str]) -> list[Tensor]:
    with dual_level():
        duals: dict[str, Tensor] = _leaves(parameters)
        duals.update({name: _dual(duals[name], tangent) for name, tangent in vector.items()})
        slopes = _gradients([part(duals)], [duals[name] for name in names], create_graph=True)
        tangents = [unpack_dual(slope).tangent for slope in slopes]
        return [
            torch.zeros_like(parameters[name]) if tangent is None else tangent.detach()
            for name, tangent in zip(names, tangents, strict=True)
        ]


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():  # the first dual number makes torch compile its own rules by a deprecated way
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        return make_dual(value, tangent)


@contextmanager
def replayed_losses(
    objective: Objective,
    seed: int,
    second_order: bool = False,
    micro_batch_size: int | None = None,
    backend: str = "reverse_over_reverse",
) -> Iterator[Callable[[Sequence[Any]], Losses]]:
    """Open the sandbox of `objective`; yield a function from batches B_0, B_1, ... to the module's losses on them.

    The losses are functions of the parameters they are given; those left out keep the module's values.
    Noise is drawn from (seed, step, slice). Buffers that a step writes are met by the next one, as in training, and a
    step is replayed on those it met first. Autocast is off.

    Args:
        objective: the module's loss.
        seed: of dropout and other noise, >= 0.
        second_order: choose kernels that have second derivatives.
        micro_batch_size: samples evaluated at a time, >= 1; None takes whole batches. A mean loss is assumed.
        backend: see `Losses`.
    """
    module = objective.module
    device = next(iter(named_tensors(module).values())).device
    with ExitStack() as stack:
        step = stack.enter_context(objective.open())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if second_order:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_without_fused_recurrence(module))
        constants = point_of(module)
        seeds = count(seed, _SAMPLE_STRIDE)

        def losses(batches: Sequence[Any]) -> Losses:
            replay = _Replay(module, step, constants, batches, next(seeds), micro_batch_size)
            return Losses(replay.parts, objective.reduce, backend, lambda: objective.advance())

        yield losses


class _Replay:
    """The losses of a module on a list of batches, each with the noise and the buffers of its first evaluation."""

    def __init__(
        self,
        module: nn.Module,
        step: nn.Module,
        constants: Parameters,
        batches: Sequence[Any],
        seed: int,
        micro_batch_size: int | None,
    ) -> None:
        self.module, self.step, self.constants, self.seed = module, step, constants, seed
        self.batches, self.micro_batch_size = batches, micro_batch_size
        self.buffers = {name: _working(buffer) for name, buffer in buffers_of(module).items()}
        self.met: dict[tuple[int, int], dict[str, Tensor]] = {}

    def parts(self, step: int) -> list[Part]:
        batch = _working_batch(self.batches[step], self.module)
        pieces = _pieces(batch, self.micro_batch_size)
        return [partial(self.evaluate, (step, index), *piece) for index, piece in enumerate(pieces)]

    def evaluate(self, key: tuple[int, int], batch: Any, weight: float, parameters: Parameters) -> Tensor:
        first = not self.met
        new = key not in self.met
        before = self.met.setdefault(key, self.buffers)
        after = {name: buffer.clone() for name, buffer in before.items()}
        seed_all(self.seed + _NOISE_STRIDE * key[0] + key[1])
        loss = evaluate(self.step, {**self.constants, **parameters}, after, batch, key[0], check=False)
        if first:
            check_functional(loss, self.module)
        if new:  # unchanged buffers are shared, so that a long path does not hold a copy of each per step
            self.buffers = {
                name: buffer if torch.equal(buffer, after[name]) else after[name].detach()
                for name, buffer in before.items()
            }
        return loss if weight == 1.0 else loss * weight


def _pieces(batch: Any, size: int | None) -> list[tuple[Any, float]]:
    """(slice, its share of the samples) of a batch."""
    if size is None or (length := batch_length(batch)) <= size:
        return [(batch, 1.0)]
    bounds = [(begin, min(begin + size, length)) for begin in range(0, length, size)]
    return [(slice_batch(batch, begin, end), (end - begin) / length) for begin, end in bounds]


def check_functional(loss: Tensor, module: nn.Module) -> None:
    """Raise ValueError if the loss does not depend on parameters handed in, or reaches those of the live module.

    A module that keeps its parameters a second time (in a list, in a closure) cannot be evaluated at others.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any parameter: it is detached or computed without gradients. Return the loss "
            "with its graph from `training_step`, or give `loss_fn(module, batch) -> scalar tensor`."
        )
    live = {id(parameter): name for name, parameter in named_tensors(module).items()}
    variables = (getattr(node, "variable", None) for node in graph_nodes([loss]))
    reached = next((live[id(variable)] for variable in variables if id(variable) in live), None)
    if reached is not None:
        holder = _holder(module, named_tensors(module)[reached])
        also = f": attribute {holder!r} holds it a second time" if holder else ""
        raise ValueError(
            f"the loss uses the parameter {reached!r} of the live module although another value was handed in{also}. "
            "Read parameters from the modules that own them in every step."
        )


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the graphs behind tensors, each once."""
    seen, stack = set(), [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def _holder(module: nn.Module, parameter: Tensor) -> str | None:
    """Name of the attribute, outside the registered parameters, that holds `parameter`."""
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name in ("_parameters", "_modules", "_buffers", "_flat_weights"):
                continue
            items = value.values() if isinstance(value, Mapping) else value
            items = items if isinstance(value, (list, tuple, Mapping)) else (value,)
            if any(item is parameter for item in items):
                return f"{path}.{name}" if path else name
    return None


@contextmanager
def _without_fused_recurrence(module: nn.Module) -> Iterator[None]:
    """cuDNN's recurrent layers have no double backward; convolutions keep cuDNN where there is no such layer."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(child, nn.RNNBase) for child in module.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def point_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by canonical name, detached, whole, in at least float32."""
    return {name: _working(full(parameter.detach()).clone()) for name, parameter in named_tensors(module).items()}


def trainable_names(module: nn.Module) -> list[str]:
    """Return the canonical names of all floating parameters that require gradients."""
    return [name for name, p in named_tensors(module).items() if p.requires_grad and p.is_floating_point()]


def _working(tensor: Tensor) -> Tensor:
    """Second-order terms underflow in half precision; float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _working_batch(batch: Any, module: nn.Module) -> Any:
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return map_batch(batch, _working) if dtypes & {torch.float16, torch.bfloat16} else batch
