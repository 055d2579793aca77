"""How CHITA's gradients, its solve and its memory grow with the number of weights p and of gradient rows n.

`pytest -m benchmark -s tests/benchmarks/test_chita_scaling.py`

Real networks (random pictures: only the cost counts) show the seconds for gradients and solve; the accuracy of MLPNet is
measured where LIGHTNING_PRUNE_DATA holds MNIST and its weights. Synthetic rows carry the solve on to 25 million weights.
A line whose matrix would take more than LIGHTNING_PRUNE_MEMORY GiB (default: half of what is free) is left out. The largest
case, 256 gradients of 25 million weights, is a test of its own (`-k 25_million`): in memory, and in a scratch file in the
folder LIGHTNING_PRUNE_SCRATCH (default: pytest's own).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import CHITA, prune
from lightning_prune._scratch import empty_matrix, free_disk
from lightning_prune.methods._chita_problem import Quadratic, relative_ridge
from lightning_prune.methods._chita_refit import RefitSettings
from lightning_prune.methods._chita_room import free_bytes
from lightning_prune.methods._chita_solver import solve_block
from lightning_prune.methods._chita_stages import StageSettings, run_stage
from lightning_prune.objective import Objective, calibration_loader
from lightning_prune.recipes.data import MNIST
from lightning_prune.recipes.networks import mlpnet, resnet20
from lightning_prune.sample_gradients import GradientSource

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
CPU = torch.device("cpu")
SPARSITY = 0.9
SETTINGS = StageSettings((1e-4,), metric=0.0, refit=RefitSettings(count=0))
COLUMNS = (
    "rows from", "p", "n", "storage", "solver", "gradients s", "solve s", "ns / (n p)", "matrix GiB", "gradients GiB",
    "solve GiB",
)  # fmt: skip
pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]


def loss(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def budget() -> float:
    """Bytes that one matrix may take."""
    given = os.environ.get("LIGHTNING_PRUNE_MEMORY")
    return float(given) * 2**30 if given else (free_bytes(CPU) or 2**32) / 2


def resident(key: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since `forget_peak`; 0 where that is not told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def forget_peak() -> int:
    """Give freed memory back to the system and start the peak anew; returns what is in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # the peak is then that of the whole process
        return 0
    return resident("VmRSS")


class OwnMemory:
    """Watches the most memory this process has for itself; pages of files, which the system may drop, do not count."""

    def __init__(self) -> None:
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, resident("RssAnon"))

    def __enter__(self) -> OwnMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def solve(rows: Tensor, weights: Tensor, algorithm: str, sizes: list[int]) -> Tensor:
    """One stage at 90 %, the repair of the kept weights included."""
    k = weights.numel() - int(SPARSITY * weights.numel())
    if algorithm == "block":
        return solve_block(Quadratic(rows, weights, relative_ridge(rows, 1e-4)), k, sizes, 500).weights
    return run_stage(weights, k, rows, 1, lambda at: 0.0, SETTINGS).weights


def measured(name: str, make: Callable[[], Tensor], weights: Tensor, algorithm: str, sizes: list[int]) -> list[str]:
    """One line of the table."""
    before = forget_peak()
    rows, gradient_seconds = timed(make)
    n, p, size = rows.shape[0], rows.shape[1], rows.numel() * rows.element_size()
    storage, gradient_peak = str(rows.dtype).removeprefix("torch."), resident("VmHWM") - before
    forget_peak()
    pruned, seconds = timed(lambda: solve(rows, weights, algorithm, sizes))
    assert int((pruned != 0).sum()) <= p - int(SPARSITY * p)
    solve_peak = resident("VmHWM") - before
    return [
        name, f"{p:,}", str(n), storage, algorithm, f"{gradient_seconds:.2f}" if name != "random" else "-",
        f"{seconds:.2f}", f"{seconds / n / p * 1e9:.2f}", f"{size / 2**30:.2f}",
        f"{gradient_peak / 2**30:.2f}" if name != "random" else "-", f"{solve_peak / 2**30:.2f}",
    ]  # fmt: skip


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    yield "MLPNet", mlpnet(), (1, 28, 28)
    yield "ResNet-20", resnet20(), (3, 32, 32)


def gradient_maker(net: nn.Module, shape: tuple[int, ...], n: int) -> tuple[Callable[[], Tensor], Tensor, list[int]]:
    names = [name for name, parameter in net.named_parameters() if parameter.dim() > 1]
    weights = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    batch = torch.randn(n, *shape), torch.randint(10, (n,))

    def make() -> Tensor:
        parts = [(batch[0][i : i + 250], batch[1][i : i + 250]) for i in range(0, n, 250)]
        with GradientSource(Objective(net, lambda count: iter(parts), loss), names) as source:
            return source.rows(n, 1)

    return make, weights, [net.get_parameter(name).numel() for name in names]


def random_rows(n: int, p: int, dtype: torch.dtype, folder: str | None = None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        rows = empty_matrix(n, p, dtype, CPU, folder)
        for row in rows:  # row by row: no float32 copy of a bfloat16 matrix
            row.copy_(torch.randn(p))
        return rows

    return make


def test_seconds_and_memory_are_linear_in_the_number_of_weights() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title="CHITA, one stage at 0.9 without refits, 1 thread")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    costs: dict[int, float] = {}

    def add(name: str, make: Callable[[], Tensor], weights: Tensor, algorithm: str, sizes: list[int]) -> None:
        line = measured(name, make, weights, algorithm, sizes)
        table.add_row(*line)
        Console(width=140).print("| " + " | ".join(line) + " |")
        if name == "random" and algorithm == "bso" and line[3] == "float32" and line[2] == "250":
            costs[weights.numel()] = float(line[6])

    for name, net, shape in networks():
        for n in (250, 1000, 4000):
            make, weights, sizes = gradient_maker(net, shape, n)
            if n * weights.numel() * 4 <= budget():
                make_first = gradient_maker(net, shape, 4)[0]
                make_first()  # what is paid once
                add(name, make, weights, "bso", sizes)
    plan = [
        *(
            (n, p, torch.float32, "bso")
            for p in (30_000, 300_000, 3_000_000, 25_000_000)
            for n in (64, 250, 1000, 4000)
        ),
        *((n, 25_000_000, torch.bfloat16, how) for n in (64, 256) for how in ("bso", "block")),
        *((250, p, torch.float32, "block") for p in (30_000, 300_000, 3_000_000)),
    ]
    for n, p, dtype, algorithm in plan:
        size = n * p * torch.empty((), dtype=dtype).element_size()
        if size <= budget():
            add("random", random_rows(n, p, dtype), torch.randn(p), algorithm, [p])
    Console(width=140).print(table)
    sizes_seen = sorted(costs)
    assert costs[sizes_seen[-1]] / costs[sizes_seen[0]] <= 3 * sizes_seen[-1] / sizes_seen[0]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_25_million_weights_with_256_gradients_fit_in_16_gb(where: str, tmp_path: Path) -> None:
    """One stage as by default (three ridges, with and without the first-order step), rows in bfloat16."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, p = 256, 25_000_000
    folder = os.environ.get("LIGHTNING_PRUNE_SCRATCH", str(tmp_path)) if where == "file" else None
    room = free_bytes(CPU) or 0 if folder is None else free_disk(folder)
    if room < (17e9 if folder is None else 13e9):
        pytest.skip(f"only {room / 1e9:.1f} GB are free")
    weights, settings = torch.randn(p), StageSettings(refit=RefitSettings(count=0))
    drawn = torch.randn(p + n).bfloat16()
    with OwnMemory() as memory:
        rows = empty_matrix(n, p, torch.bfloat16, CPU, folder)
        for i, row in enumerate(rows):
            row.copy_(drawn[i : i + p])
        stage, seconds = timed(lambda: run_stage(weights, p // 10, rows, 16, lambda at: 0.0, settings))
    Console(width=140).print(
        f"| 25,000,000 | 256 | bfloat16 | {where} | {seconds:.0f} s to solve | "
        f"{n * p * 2 / 1e9:.1f} GB matrix | {memory.most / 1e9:.1f} GB of the process |"
    )
    assert int(stage.support.sum()) == p // 10
    assert 0 < memory.most <= (16e9 if folder is None else 5e9)


@pytest.mark.skipif(
    not (FOLDER / "mlpnet_mnist.safetensors").is_file(),
    reason="needs MNIST and mlpnet_mnist.safetensors in LIGHTNING_PRUNE_DATA",
)
def test_accuracy_of_mlpnet_for_more_rows() -> None:
    torch.set_num_threads(1)
    data = MNIST(batch_size=2000)
    data.prepare_data()
    data.setup("fit")
    test = [torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True)]
    console = Console(width=120)
    for n in (250, 1000, 4000):
        for refits in (0, 40):
            net = mlpnet()
            net.load_state_dict(load_file(FOLDER / "mlpnet_mnist.safetensors"))
            method = CHITA(SPARSITY, num_grads=n, grad_batch=12, refits=refits, measure=False)
            loader = calibration_loader(data.train_dataloader(), 0)
            _, seconds = timed(lambda net=net, method=method, loader=loader: prune(net, method, loader, loss))
            with torch.no_grad():
                accuracy = 100 * float((net(test[0]).argmax(1) == test[1]).float().mean())
            console.print(f"| MLPNet, refits={refits} | {n} x 12 | {accuracy:.2f} | {seconds:.1f} |")
            assert accuracy > 50
