"""Two processes hold the same masks and weights; shards (FSDP2) are masked like whole tensors."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration.contract import NAMES, read_spec
from integration.toys import QUIET, STEPS, ResumableLoader, Toy, Watch, fit, masks_of, same, toy, weights_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import lightning_prune.callback
from lightning_prune import GradualMagnitude, Magnitude, MaskManager, RNGState
from lightning_prune.context import Context, Proposal
from lightning_prune.fit import check_strategy
from lightning_prune.masks import full

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*use of fork"),
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]


class Record(Callback):
    """Writes what this rank holds at the end; after a fork the parent process sees none of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        masks = {name: mask.cpu() for name, mask in masks_of(pl_module).items()}
        weights = {name: full(tensor).cpu() for name, tensor in weights_of(pl_module).items()}
        torch.save({"masks": masks, "weights": weights}, self.folder / f"{trainer.global_rank}.pt")


def ddp(folder: Path, *callbacks: Callback, module: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """Train on two processes; return what each rank recorded."""
    module = toy() if module is None else module
    fit(module, *callbacks, Record(folder), strategy="ddp_fork", devices=2, **settings)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


class RankNoise(Magnitude):
    """Scores that depend on the rank, as gradients of different batches do."""

    def propose(self, context: Context) -> Proposal:
        rank = torch.distributed.get_rank()
        noise = torch.Generator().manual_seed(rank)
        scores = {name: torch.rand(weight.shape, generator=noise) for name, weight in context.weights.items()}
        return super().propose(Context(**{**vars(context), "weights": scores}))


@pytest.mark.parametrize("name", NAMES)
def test_both_ranks_end_with_the_same_masks_and_weights(name: str, tmp_path: Path) -> None:
    spec = read_spec(name)
    one, two = ddp(tmp_path, spec.build())
    assert same(one["masks"], two["masks"])
    assert same({k: v for k, v in one["weights"].items() if "norm" not in k}, without_norm(two["weights"]))
    assert sum(int((~mask).sum()) for mask in one["masks"].values()) > 0
    assert all(not one["weights"][key][~mask].any() for key, mask in one["masks"].items())


def without_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out BatchNorm, whose running statistics are each rank's own."""
    return {name: tensor for name, tensor in weights.items() if "norm" not in name}


def test_scores_that_depend_on_the_rank_give_one_mask(tmp_path: Path) -> None:
    one, two = ddp(tmp_path, RankNoise(0.5, measure=False))
    assert same(one["masks"], two["masks"])
    assert same(without_norm(one["weights"]), without_norm(two["weights"]))


class RankRepairs(Magnitude):
    """New values for other tensors on each rank, as a repair gives that judges by a rank's own data."""

    def propose(self, context: Context) -> Proposal:
        proposal = super().propose(context)
        rank = torch.distributed.get_rank()
        names = list(proposal.masks)[: 1 + rank]
        proposal.weights = {name: context.weights[name] * (2.0 + rank) for name in names}
        proposal.repairs.append(f"{len(names)} repaired")
        return proposal


def test_repairs_that_differ_between_ranks_are_those_of_the_first(tmp_path: Path) -> None:
    callback = RankRepairs(0.5, measure=False)
    one, two = ddp(tmp_path, callback)
    assert same(one["masks"], two["masks"])
    assert same(without_norm(one["weights"]), without_norm(two["weights"]))


def test_without_the_broadcast_ranks_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setattr(lightning_prune.callback, "same_on_all_ranks", lambda proposal, device: proposal)
    one, two = ddp(tmp_path, RankNoise(0.5, measure=False))
    assert not same(one["masks"], two["masks"])
    assert not same(without_norm(one["weights"]), without_norm(two["weights"]))


def test_a_run_on_two_ranks_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, *more: Callback, **settings: Any) -> list[dict[str, Any]]:
        (tmp_path / folder).mkdir()
        callbacks = [GradualMagnitude(0.8, every_n_steps=1, measure=False), RNGState(), *more]
        return ddp(tmp_path / folder, *callbacks, module=toy(dropout=0.4), **settings)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run("whole", saver, enable_checkpointing=True)
    states = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["lightning_prune.rng_state"]
    assert len(states["ranks"]) == 2
    resumed = run("resumed", ckpt_path=tmp_path / "epoch=0.ckpt")
    for rank in range(2):
        assert same(resumed[rank], whole[rank]), rank


def test_averaged_weights_are_sparse_on_both_ranks(tmp_path: Path) -> None:
    callbacks = [Magnitude(0.5, at=1, measure=False), EMAWeightAveraging(decay=0.5)]
    for held in ddp(tmp_path, *callbacks):
        assert all(not held["weights"][key][~mask].any() for key, mask in held["masks"].items())


# FSDP2


class Sharded(Toy):
    """Every parameter is split over the ranks; BatchNorm is left out, whose buffers would stay local."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = torch.nn.Identity()

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not isinstance(next(self.parameters()), lightning_prune.masks.DTensor):
            for layer in (self.conv, self.hidden, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def on_two_ranks(work: Callable[[], Any]) -> list[int]:
    """Run `work` in two forked processes that find each other as torchrun's do; return their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}

    def child(rank: int) -> None:
        os.environ.update({key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()})
        work()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def sharded_fit(folder: Path, *callbacks: Callback, **settings: Any) -> Any:
    module = toy(kind=Sharded)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    settings = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, **settings}
    return fit(module, *callbacks, Record(folder), loader=ResumableLoader(), **settings)


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_shards_are_masked_as_whole_tensors_are(tmp_path: Path) -> None:
    """Both ranks read the same batches here, so one process on its own gets the same weights up to rounding."""
    assert on_two_ranks(lambda: sharded_fit(tmp_path, Magnitude(0.5, at=1, measure=False))) == [0, 0]
    one, two = recorded(tmp_path)
    assert same(one, two)
    alone = toy(kind=Sharded)
    alone.configure_model = lambda: None
    fit(alone, Magnitude(0.5, at=1, measure=False), loader=ResumableLoader())
    assert same(one["masks"], masks_of(alone))
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(one["weights"][name], weight)
    assert sum(int(mask.sum()) for mask in one["masks"].values()) == Toy.TOTAL // 2
    assert all(not one["weights"][name][~mask].any() for name, mask in one["masks"].items())


def test_shards_resume_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, *more: Callback, **settings: Any) -> list[dict[str, Any]]:
        (tmp_path / folder).mkdir()
        callback = GradualMagnitude(0.8, every_n_steps=2, measure=False)
        assert on_two_ranks(lambda: sharded_fit(tmp_path / folder, callback, *more, **settings)) == [0, 0]
        return recorded(tmp_path / folder)

    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run("whole", saver, enable_checkpointing=True)
    resumed = run("resumed", ckpt_path=tmp_path / "saved" / f"step={STEPS + 3}.ckpt")
    assert same(resumed, whole)


def test_a_method_that_cannot_score_shards_says_so(tmp_path: Path) -> None:
    class Whole(Magnitude):
        shards = False

    def work() -> None:
        with pytest.raises(MisconfigurationException, match="cannot score sharded parameters"):
            sharded_fit(tmp_path, Whole(0.5, measure=False))

    assert on_two_ranks(work) == [0, 0]


def test_fsdp1_is_refused() -> None:
    """It keeps flat parameters of its own; FSDP2 is what `ModelParallelStrategy` does."""
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy.*ModelParallelStrategy"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))


def test_watch_sees_a_leak() -> None:
    """The check used all over these tests would notice: masks set by hand are not enforced before `attach`."""
    module, watch = toy(), Watch()
    MaskManager.of(module).set_masks({"head.weight": torch.zeros(3, 12, dtype=torch.bool)})
    fit(module, watch)
    assert set(watch.found) == {"head.weight"}
