"""CHITA with its gradient matrix in a scratch file: the same bits, memory that does not hold the matrix, nothing left."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chita_oracles import draw
from methods.prospr_cases import QUIET, entropy, same
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import CHITA, MaskManager, _scratch, prune
from lightning_prune.methods import _chita_iht, _chita_room
from lightning_prune.methods._chita_solver import solve_iht
from lightning_prune.objective import Objective
from lightning_prune.sample_gradients import GradientSource, gradient_rows

pytestmark = QUIET
CPU = torch.device("cpu")
ALGORITHMS = ["bso", "iht", "block", "obs", "woodfisher"]


def pruned(net: nn.Module, data: Any, **arguments: Any) -> dict[str, Tensor]:
    settings = {"stages": 2, "num_grads": 8, "grad_batch": 2, "refits": 2, "refit_samples": 8, "measure": False}
    prune(net, CHITA(0.7, **{**settings, **arguments}), data, entropy)
    return {name: value.clone() for name, value in net.state_dict().items()}


# the same result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_result_is_that_in_memory_bit_for_bit(
    algorithm: str, dtype: str, tiny_class: Any, loader: DataLoader, tmp_path: Path
) -> None:
    results = []
    for folder in (None, str(tmp_path)):
        torch.manual_seed(0)
        results.append(pruned(tiny_class(), loader, algorithm=algorithm, grad_dtype=dtype, offload=folder))
    assert same(*results)


def test_the_first_order_term_may_have_a_batch_of_its_own(tiny_class: Any, loader: DataLoader, tmp_path: Path) -> None:
    results = []
    for folder in (None, str(tmp_path)):
        torch.manual_seed(0)
        results.append(pruned(tiny_class(), loader, gradient_samples=12, offload=folder))
    assert same(*results)


@pytest.mark.parametrize("way", ["outer", "vmap", "loop"])
def test_rows_in_a_file_are_those_in_memory(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = torch.randn(12, 4), torch.randint(3, (12,))
    objective = Objective(net, lambda count: iter([batch]), entropy)
    names = ["0.weight", "2.weight"]
    rows = [gradient_rows(objective, names, 5, 2, way=way, offload=folder) for folder in (None, str(tmp_path))]
    assert torch.equal(*rows)


@pytest.mark.parametrize("way", ["outer", "vmap", "loop"])
def test_rows_of_another_device_reach_the_file_by_a_copy(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = torch.randn(12, 4), torch.randint(3, (12,))
    rows = []
    for device in (CPU, torch.device("cpu", 0)):  # the same one by a name that differs, as a GPU's would
        objective = Objective(net, lambda count: iter([batch]), entropy)
        with GradientSource(objective, ["0.weight", "2.weight"], way) as source:
            source.device = device
            rows.append(source.rows(5, 2, offload=str(tmp_path)))
    assert torch.equal(*rows)


def test_a_working_set_too_large_to_copy_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10):
        problem = draw(seed, n=6, p=60, step=0.2)
        copied = solve_iht(problem, 4)
        monkeypatch.setattr(_chita_iht, "_GATHERED", 0)
        assert torch.equal(solve_iht(problem, 4).support, copied.support)
        monkeypatch.undo()


# what stays of it


def test_no_file_has_a_name_or_outlives_the_matrix(tmp_path: Path) -> None:
    opened = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    matrix = _scratch.empty_matrix(30, 50, torch.bfloat16, CPU, str(tmp_path))
    matrix.copy_(torch.arange(1500).view(30, 50))
    assert matrix.shape == (30, 50)
    assert matrix.dtype == torch.bfloat16
    assert float(matrix[29, 49]) == float(torch.tensor(1499.0).bfloat16())
    assert list(tmp_path.iterdir()) == []
    del matrix
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) == opened


@contextmanager
def only(more: int) -> Iterator[None]:
    """Let the process have so many bytes of its own beyond what it has; pages of files do not count."""
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize(
    ("algorithm", "dtype", "n"), [("bso", "float32", 200), ("bso", "bfloat16", 600), ("block", "float32", 200)]
)
def test_a_matrix_larger_than_memory_is_solved_from_its_file(
    algorithm: str, dtype: str, n: int, tmp_path: Path
) -> None:
    def run(folder: str | None) -> tuple[int, int]:
        torch.manual_seed(0)
        net = nn.Linear(2000, 200)
        batches = [(torch.randn(50, 2000), torch.randint(200, (50,))) for _ in range(n // 50)]
        few: dict[str, Any] = {"stages": 1, "ridge": 1e-3, "block_size": 100, "refits": 0, "grad_dtype": dtype}
        pruned(net, batches, num_grads=n, grad_batch=1, algorithm=algorithm, offload=folder, **few)
        return MaskManager.of(net).counts()

    matrix = n * 400_000 * (4 if dtype == "float32" else 2)
    with only(matrix * 2 // 3):
        try:
            torch.empty(matrix // 4)
        except RuntimeError:
            pass
        else:
            pytest.skip("the system does not enforce the limit")
        with pytest.raises(RuntimeError, match="allocate"):
            run(None)
        assert run(str(tmp_path)) == (120_000, 400_000)
    assert list(tmp_path.iterdir()) == []


# refusals


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (3, "`offload` must be the path of a folder, got 3. Give one on a disk with room, or null"),
        ("", "`offload` must be the path of a folder, got ''"),
        ("nowhere", r"`offload` must be a folder that exists, got '.*nowhere'. Create it first"),
        ("file", r"`offload` must be a folder that exists, got '.*file'"),
        ("locked", r"`offload` must be a folder that can be written to, got '.*locked'. Choose another"),
    ],
)
def test_what_is_no_folder_to_write_to_is_refused(
    folder: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    access = os.access  # whoever may write everywhere is told so whatever the mode of the folder
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    given = str(tmp_path / folder) if folder and isinstance(folder, str) else folder
    with pytest.raises(ValueError, match=message):
        CHITA(0.5, offload=given)


def test_a_folder_without_room_is_refused_before_any_work(
    tiny: Any, loader: DataLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    monkeypatch.setattr(_chita_room, "free_disk", lambda folder: 4 * 8 * 188 - 1)
    message = r"`offload`='.*' has 0.0 GiB free, and `num_grads`=8 gradients of 188 weights need .* Give a folder on a"
    with pytest.raises(ValueError, match=message):
        pruned(tiny, loader, offload=str(tmp_path))
    assert same(dict(tiny.state_dict()), before)
    assert MaskManager.of(tiny).masks == {}
    monkeypatch.setattr(_chita_room, "free_disk", lambda folder: 4 * 8 * 188)
    pruned(tiny, loader, offload=str(tmp_path))


def test_a_disk_that_fills_up_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ValueError, match=r"has no room for 0.0 GiB of gradients .* lower `num_grads`, or use"):
        _scratch.empty_matrix(3, 4, torch.float32, CPU, str(tmp_path))


def test_the_estimate_of_memory_leaves_out_a_matrix_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 256, 25_000_000
    size, vectors, squares = 4 * rows * columns, 32 * 4 * columns, 3 * 8 * rows**2
    for offloaded, needed in ((False, size + size // 4 + squares), (True, vectors + 2**29 + squares)):
        monkeypatch.setattr(_chita_room, "free_bytes", lambda device, needed=needed: needed)
        _chita_room.check_memory(rows, columns, torch.float32, CPU, offloaded=offloaded)
        monkeypatch.setattr(_chita_room, "free_bytes", lambda device, needed=needed: needed - 1)
        with pytest.raises(ValueError, match=r"`num_grads`=256 .*grad_dtype='bfloat16'.*algorithm='block'") as error:
            _chita_room.check_memory(rows, columns, torch.float32, CPU, offloaded=offloaded)
        assert ("offload='FOLDER'" in str(error.value)) is not offloaded
