"""What the tests of ProsPr share: an unrolled oracle, small networks in float64, a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune import MaskManager, ProsPr
from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods.prospr import InnerSGD
from lightning_prune.objective import Objective

Point = dict[str, Tensor]
LossAt = Callable[[int, Mapping[str, Tensor]], Tensor]
SGD_VARIANTS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.03},
    "momentum": {"momentum": 0.9},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.03},
    "nesterov and weight decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.03},
}

# Lightning's hints about small tests, and ours about thin layers
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec",
        ".*smaller than the logging interval",
        "Checkpoint directory .* exists",
        "Be aware that when using `ckpt_path`",
        ".*use of fork",
        ".*keeps less than 1 %",
        ".*left no weight in",
    )
]


def losses_of(function: LossAt, backend: str = "reverse_over_reverse") -> Losses:
    """The losses L_t(theta) = function(t, theta), each in one part."""
    return Losses(lambda step: [lambda theta: function(step, theta)], backend=backend)


def unrolled(
    function: LossAt, start: Mapping[str, Tensor], sgd: InnerSGD, trained: list[str] | None = None
) -> dict[str, Tensor]:
    """Naive oracle: differentiate through torch-style SGD steps kept in one graph."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    trained = list(leaves) if trained is None else trained
    point: Point = dict(leaves)
    buffers: Point = {}
    for step in range(sgd.steps):
        slopes = torch.autograd.grad(
            function(step, point), [point[n] for n in trained], create_graph=True, materialize_grads=True
        )
        for name, slope in zip(trained, slopes, strict=True):
            pull = slope + sgd.weight_decay * point[name]
            if sgd.momentum:
                first = pull.detach() if sgd.detach_first_momentum else pull
                buffers[name] = first if step == 0 else sgd.momentum * buffers[name] + pull
                pull = pull + sgd.momentum * buffers[name] if sgd.nesterov else buffers[name]
            point[name] = point[name] - sgd.lr * pull
    loss = function(sgd.steps, point)
    values = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, values, strict=True))


def relative_difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest difference over all entries, in units of the largest entry of `two`."""
    largest = max(float(value.abs().max()) for value in two.values())
    return max(float((one[name] - two[name]).abs().max()) for name in two) / largest


def quadratics(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Distinct symmetric A_t, vectors b_t and a start, in float64; the A_t do not commute."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, 5, 6, generator=generator, dtype=torch.float64)
    matrices = [a[:, :5] @ a[:, :5].T / 5 for a in random]
    assert float((matrices[0] @ matrices[1] - matrices[1] @ matrices[0]).abs().max()) > 0.1
    return matrices, [a[:, 5] for a in random], torch.randn(5, generator=generator, dtype=torch.float64)


class Network(LightningModule):
    """Any network with cross-entropy as a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0][:, -1])


class Attention(nn.Module):
    """One pre-norm attention layer with a fused kernel in ordinary use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def convolutional(norm: bool, dropout: float) -> nn.Module:
    """Two convolutions and a linear layer on images of 2 x 6 x 6."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5) if norm else nn.Identity(),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: convolutional(False, 0.0), (2, 6, 6)),
    "batch norm and dropout": (lambda: convolutional(True, 0.3), (2, 6, 6)),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
    ),
    "lstm": (Recurrent, (4, 3)),
    "layer norm and attention": (Attention, (5, 8)),
}


def objective_of(network: nn.Module, shape: tuple[int, ...], batches: int = 5, size: int = 6) -> Objective:
    """The loss of a float64 network on batches that are the same at every call."""
    generator = torch.Generator().manual_seed(3)
    data = [
        (torch.randn(size, *shape, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(batches)
    ]
    return Objective(Network(network).double(), lambda count: data[:count])


@contextmanager
def opened(network: str, backend: str = "reverse_over_reverse", **arguments: Any) -> Iterator[tuple[Losses, Point]]:
    """The losses of a named network on five batches, and its parameters."""
    make, shape = NETWORKS[network]
    objective = objective_of(make(), shape)
    with replayed_losses(objective, seed=5, second_order=True, backend=backend, **arguments) as losses:
        yield losses(objective.batches(5)), point_of(objective.module)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    """A quiet Trainer on the CPU, one epoch long."""
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **settings},
    )


def pruner(sparsity: float = 0.8, **arguments: Any) -> ProsPr:
    return ProsPr(sparsity, **{"inner_momentum": 0.9, "measure": False, **arguments})


def masks_after(make: Callable[[], Any], loader: Any, callback: Callback) -> dict[str, Tensor]:
    """Fit a module of seed 0; return its masks."""
    torch.manual_seed(0)
    module = make()
    trainer_of(callback).fit(module, loader)
    return MaskManager.of(module).masks


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def entropy(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class WithoutCurvature(torch.autograd.Function):
    """Doubles its input; its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return 2 * value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def without_curvature(module: Any, batch: Any) -> Tensor:
    return entropy(lambda images: WithoutCurvature.apply(module(images)), batch)
