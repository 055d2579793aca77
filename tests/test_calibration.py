"""Calibration batches: every loader is read without disturbing the run that it feeds."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchmetrics import MeanMetric

from lightning_prune.objective import Objective, calibration_loader, map_loaders, read_batches, to_device
from lightning_prune.sandbox import seed_all


class Numbers(Dataset):
    """n numbers; each is drawn with noise of the global generators, as augmentation does."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        noise = float(torch.rand(1)) + random.random() + np.random.rand()
        return torch.tensor([float(index), noise])


def next_draws() -> tuple[float, float, float]:
    """The next number of each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def indices(loader: DataLoader, seed: int = 0, count: int | None = None) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in read_batches(loader, count, seed)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS = {
    "plain": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "generator": lambda data: DataLoader(data, batch_size=4, shuffle=True, generator=generator()),
    "batch_sampler": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator()), 4, drop_last=False)
    ),
    "ordered": lambda data: DataLoader(data, batch_size=4),
    "weighted": lambda data: DataLoader(
        data, batch_size=4, sampler=WeightedRandomSampler([1.0] * len(data), len(data), generator=generator())
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pass_reads_every_sample_once_in_an_order_of_its_seed(kind):
    loader = LOADERS[kind](Numbers())
    first, again, other = (indices(calibration_loader(loader, seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(chain(*first)) == list(range(10))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", LOADERS)
def test_the_loader_of_the_run_goes_on_as_if_it_had_not_been_read(kind):
    """Order, augmentation and the generators afterwards are those of a run without calibration."""
    runs = []
    for calibrate in (True, False):
        seed_all(3)
        loader = LOADERS[kind](Numbers())
        iterator = iter(loader)
        seen = [next(iterator)]
        if calibrate:
            batches = list(read_batches(calibration_loader(loader, 0), 2, seed=0))
            assert len(batches) == 2
        seen += [*iterator, *loader]
        runs.append((torch.cat(seen), next_draws()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_augmentation_is_drawn_from_the_seed():
    loader = calibration_loader(LOADERS["plain"](Numbers()), 0)
    one, two, other = (torch.cat(list(read_batches(loader, None, seed))) for seed in (4, 4, 5))
    assert torch.equal(one.sort(dim=0).values, two.sort(dim=0).values)
    assert not torch.equal(one.sort(dim=0).values, other.sort(dim=0).values)


@pytest.mark.parametrize("kind", ["plain", "batch_sampler"])
def test_incomplete_batches_are_dropped_where_the_loader_drops_them(kind):
    data = Numbers()
    loader = (
        DataLoader(data, batch_size=4, drop_last=True)
        if kind == "plain"
        else DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=True))
    )
    assert [len(batch) for batch in indices(calibration_loader(loader, 0))] == [4, 4]


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_a_loader_over_a_part_of_the_data_is_calibrated_on_that_part(kind):
    """The rest of the data set is often the validation split."""
    data, part = Numbers(), [1, 3, 5, 7, 9]
    sampler = SubsetRandomSampler(part)
    loader = (
        DataLoader(data, batch_size=2, sampler=sampler)
        if kind == "sampler"
        else DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    )
    assert sorted(chain(*indices(calibration_loader(loader, 0)))) == part


def test_the_collate_function_is_kept():
    loader = DataLoader(Numbers(), batch_size=5, collate_fn=lambda samples: len(samples))
    assert list(read_batches(calibration_loader(loader, 0), None)) == [5, 5]


def test_a_loader_without_batches_yields_samples():
    loader = calibration_loader(DataLoader(Numbers(), batch_size=None), 0)
    samples = list(read_batches(loader, None))
    assert [tuple(sample.shape) for sample in samples] == [(2,)] * 10


def test_ranks_read_disjoint_shares():
    loader = LOADERS["plain"](Numbers(8))
    shares = [list(chain(*indices(calibration_loader(loader, 0, rank, 2)))) for rank in (0, 1)]
    assert [len(share) for share in shares] == [4, 4]
    assert sorted(shares[0] + shares[1]) == list(range(8))


def test_at_most_the_count_is_read():
    loader = calibration_loader(LOADERS["plain"](Numbers()), 0)
    assert [len(list(read_batches(loader, count))) for count in (0, 1, 3, 99)] == [0, 1, 3, 3]


def test_trees_of_loaders_give_trees_of_batches():
    tree = {"a": LOADERS["ordered"](Numbers(4)), "b": [LOADERS["plain"](Numbers(12)), LOADERS["ordered"](Numbers(4))]}
    own = map_loaders(tree, lambda leaf: calibration_loader(leaf, 0))
    (batch,) = read_batches(own, None)
    assert sorted(batch["a"][:, 0].tolist()) == [0, 1, 2, 3]
    assert [len(part) for part in batch["b"]] == [4, 4]
    assert isinstance(batch["b"], list)


def test_an_empty_tree_gives_no_batch():
    assert list(read_batches([], None)) == []
    assert list(read_batches({}, 3)) == []


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([torch.ones(1)])

    with pytest.raises(ValueError, match="map-style DataLoader, got DataLoader over an IterableDataset"):
        calibration_loader(DataLoader(Stream()), 0)


def test_what_is_no_loader_is_refused():
    with pytest.raises(ValueError, match=r"map-style DataLoader, got list\. Give `calibration_dataloader`"):
        calibration_loader([torch.ones(1)], 0)


def test_a_batch_sampler_of_unknown_size_is_refused():
    class Pairs:
        def __iter__(self) -> Any:
            return iter([[0, 1], [2, 3]])

    loader = DataLoader(Numbers(), batch_sampler=Pairs())
    with pytest.raises(ValueError, match="cannot tell the batch size of the batch sampler Pairs"):
        calibration_loader(loader, 0)


def test_every_tensor_of_a_batch_is_moved_and_the_rest_stays():
    class Pair(NamedTuple):
        x: Tensor
        label: str

    other = object()
    batch = {"a": (torch.ones(1), [torch.ones(2)]), "b": Pair(torch.ones(3), "cat"), "c": other}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].shape == (2,)
    assert moved["a"][1][0].is_meta
    assert isinstance(moved["b"], Pair)
    assert moved["b"].x.is_meta
    assert moved["b"].label == "cat"
    assert moved["c"] is other


class Calibrates(Callback):
    """Takes gradients on two batches before training and after every epoch's first batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = calibration_loader(trainer.train_dataloader, 0)
        objective = Objective(pl_module, lambda count: read_batches(own, count, 0), trainer=trainer)
        objective.gradients(["conv.weight"], 2)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int):
        if index == 0:
            self.on_train_start(trainer, pl_module)


def test_a_fit_with_calibration_is_bit_for_bit_the_fit_without(tiny_class, dataset):
    class WithMetric(tiny_class):
        def __init__(self) -> None:
            super().__init__(dropout=0.3)

            self.mean = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss.detach())
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

    ends = []
    for callbacks in ([Calibrates()], []):
        seed_all(0)
        module = WithMetric()
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(dataset, batch_size=4, shuffle=True, num_workers=0))
        ends.append((module.state_dict(), {n: float(v) for n, v in trainer.callback_metrics.items()}, next_draws()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == ends[1][1]
    assert "mean" in ends[0][1]
    assert ends[0][2] == ends[1][2]
