"""Data modules that need no files: splits, seeds, loaders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.recipes.data import Digits, ImageData, RandomData
from lightning_prune.recipes.image_data import hold_out, standardise, take


def ready(data: ImageData) -> ImageData:
    data.prepare_data()
    data.setup("fit")
    return data


def rows(inputs: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def numbered(total: int) -> tuple[Tensor, Tensor]:
    return torch.arange(total, dtype=torch.float32).reshape(total, 1), torch.arange(total)


def test_digits_have_the_announced_shape_and_classes():
    data = ready(Digits(batch_size=32))
    inputs, classes = next(iter(data.train_dataloader()))
    assert inputs.shape == (32, *data.input_shape)
    assert (inputs.dtype, classes.dtype) == (torch.float32, torch.int64)
    assert set(data.parts.train[1].tolist()) == set(range(data.num_classes))


def test_digits_use_every_sample_exactly_once():
    from sklearn.datasets import load_digits

    parts = ready(Digits()).parts
    # scikit-learn rounds the test part up: ceil(0.2 * 1797) = 360, then ceil(0.125 * 1437) = 180
    assert [len(y) for _, y in parts] == [1257, 180, 360]
    pixels = torch.cat([x for x, _ in parts]) * Digits.std + Digits.mean
    original = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1)
    order = lambda images: sorted(tuple(row.flatten().tolist()) for row in images)  # noqa: E731
    assert order((pixels * 16).round()) == order(original)


def test_the_constants_of_digits_are_mean_and_deviation_of_all_pixels():
    parts = ready(Digits()).parts
    everything = torch.cat([x for x, _ in parts])
    assert everything.mean().item() == pytest.approx(0, abs=1e-3)
    assert everything.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_every_part_of_digits_has_the_classes_in_equal_proportion():
    for _, classes in ready(Digits()).parts:
        share = torch.bincount(classes, minlength=10) / len(classes)
        # the set itself has 174 to 183 of each; rounding moves at most one sample
        assert share.min() >= 173 / 1797 - 1 / len(classes)
        assert share.max() <= 184 / 1797 + 1 / len(classes)


def test_the_seed_draws_the_split():
    first, again, other = (ready(Digits(seed=seed)).parts for seed in (3, 3, 4))
    for part, same in zip(first, again, strict=True):
        assert torch.equal(part[0], same[0])
        assert torch.equal(part[1], same[1])
    assert not torch.equal(first.val[0], other.val[0])


def test_a_subset_is_drawn_from_the_training_part_alone():
    whole, small = ready(Digits()).parts, ready(Digits(subset=100)).parts
    assert len(small.train[1]) == 100
    assert rows(small.train[0]) <= rows(whole.train[0])
    assert torch.equal(small.val[0], whole.val[0])
    assert torch.equal(small.test[0], whole.test[0])


def test_a_smaller_subset_begins_a_larger_one():
    assert torch.equal(take(numbered(50), 10, seed=1)[1], take(numbered(50), 20, seed=1)[1][:10])


def test_a_subset_larger_than_the_training_part_is_refused():
    with pytest.raises(ValueError, match="`subset` must be at most the 1257 training samples, got 1258"):
        ready(Digits(subset=1258))


def test_held_out_samples_and_the_others_are_the_whole():
    train, val = hold_out(numbered(20), 6, seed=0)
    assert len(val[1]) == 6
    assert sorted([*train[1].tolist(), *val[1].tolist()]) == list(range(20))
    assert train[0][:, 0].tolist() == train[1].tolist()


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="`val_size` must be below the 20 samples"):
        hold_out(numbered(20), 20, seed=0)


def test_pixels_are_standardised_per_channel():
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    out = standardise(images, mean=(0.5, 0.2), std=(0.25, 0.1))
    assert out.flatten().tolist() == pytest.approx([-2.0, 2.0, 0.0, 2.0], abs=1e-6)
    assert images.dtype == torch.uint8


def test_training_order_follows_the_global_seed_and_changes_every_epoch():
    loader = ready(Digits(subset=64, batch_size=64)).train_dataloader()
    torch.manual_seed(1)
    first, second = (next(iter(loader))[1] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(next(iter(loader))[1], first)
    assert not torch.equal(first, second)


def test_validation_and_test_keep_their_order():
    data = ready(Digits(batch_size=50))
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert torch.equal(torch.cat([x for x, _ in loader]), getattr(data.parts, part)[0])


def test_a_second_setup_does_not_load_again():
    data = ready(Digits())
    before = data.parts
    data.setup("test")
    assert data.parts is before


def test_workers_persist_between_epochs():
    assert ready(RandomData(num_workers=1)).train_dataloader().persistent_workers
    assert not ready(RandomData()).train_dataloader().persistent_workers


def test_a_worker_process_delivers_the_same_samples():
    data = ready(RandomData((1, 2, 2), val_samples=5, num_workers=1, batch_size=5))
    assert torch.equal(next(iter(data.val_dataloader()))[0], data.parts.val[0])


def test_a_loader_before_setup_is_an_error():
    with pytest.raises(RuntimeError, match="Digits holds no data yet"):
        Digits().train_dataloader()


def test_random_data_has_the_asked_sizes_and_repeats():
    first, again = (ready(RandomData((2, 5), 3, 30, 7, 9, seed=2)) for _ in range(2))
    assert [tuple(x.shape) for x, _ in first.parts] == [(30, 2, 5), (7, 2, 5), (9, 2, 5)]
    assert set(first.parts.train[1].tolist()) == {0, 1, 2}
    assert (first.num_classes, first.input_shape) == (3, (2, 5))
    assert torch.equal(first.parts.test[0], again.parts.test[0])
    assert not rows(first.parts.train[0]) & rows(first.parts.test[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("num_workers", -1),
        ("seed", -1),
        ("subset", 0),
        ("num_classes", 1),
        ("shape", (3, 0)),
    ]
    + [(name, 0) for name in ("train_samples", "val_samples", "test_samples")],
)
def test_random_data_refuses_a_size_out_of_range(argument: str, value: int):
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer >="):
        RandomData(**{argument: value})


@pytest.mark.parametrize("argument", ["val_fraction", "test_fraction"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1])
def test_digits_refuse_a_fraction_out_of_range(argument: str, value: float):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        Digits(**{argument: value})


def test_digits_refuse_fractions_that_leave_nothing_to_train_on():
    with pytest.raises(ValueError, match="`val_fraction` \\+ `test_fraction` must be below 1"):
        Digits(val_fraction=0.5, test_fraction=0.5)


def test_a_subclass_must_define_load():
    with pytest.raises(NotImplementedError, match="ImageData must define `load`"):
        ImageData().setup()
