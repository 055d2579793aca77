"""What CHITA refuses or warns of, in one clear sentence, with the module as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods.prospr_cases import QUIET, entropy, same, trainer_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import CHITA, MaskManager, prune
from lightning_prune.methods import _chita_room, _chita_stages
from lightning_prune.sandbox import rng_states

pytestmark = QUIET
SMALL: dict[str, Any] = {"sparsity": 0.5, "num_grads": 8, "grad_batch": 2, "refits": 1, "refit_samples": 8}


def pruner(**arguments: Any) -> CHITA:
    return CHITA(**{**SMALL, "measure": False, **arguments})


def batches_with(loader: DataLoader, change: Callable[[int, Tensor], Tensor] = lambda index, x: x) -> list[Any]:
    return [(change(index, x.clone()), y) for index, (x, y) in enumerate(DataLoader(loader.dataset, batch_size=4))]


def assert_untouched(module: nn.Module, before: dict[str, Tensor], states: dict[str, Any]) -> None:
    """Weights, BatchNorm buffers, masks, gradients, modes and random states are those of before, bit for bit."""
    assert same(dict(module.state_dict()), before)
    assert MaskManager.of(module).masks == {}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    now = rng_states()
    assert torch.equal(now["torch"], states["torch"])
    assert (now["python"], now["numpy"]) == (states["python"], states["numpy"])


def refused(module: nn.Module, callback: CHITA, data: Any, message: str, error: type = ValueError, **more: Any) -> None:
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = rng_states()
    with pytest.raises(error, match=message):
        prune(module, callback, data, **{"loss_fn": entropy, **more})
    assert_untouched(module, before, states)
    assert module.training
    assert callback.history == []


# arguments


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_grads", 0, "`num_grads` must be an integer >= 1, got 0"),
        ("grad_batch", 0, "`grad_batch` must be an integer >= 1, got 0"),
        ("stages", 0, "`stages` must be an integer >= 1, got 0"),
        ("schedule", "cubic", "`schedule` must be one of 'exp', 'poly', 'linear', 'const', 'mfac', got 'cubic'"),
        ("base_level", 1.0, r"`base_level` must be in \[0, 1\), got 1.0"),
        ("polish", -1, "`polish` must be an integer >= 0, got -1"),
        ("ridge", 0.0, "`ridge` must be a finite number above 0, got 0.0"),
        ("ridge", -1e-3, "`ridge` must be a finite number above 0, got -0.001"),
        ("ridge", float("nan"), "`ridge` must be a finite number above 0, got nan"),
        ("metric", 1.5, r"`metric` must be in \[0, 1\], got 1.5"),
        ("first_order", 1, "`first_order` must be true or false, got 1"),
        ("gradient_samples", 0, "`gradient_samples` must be an integer >= 1, got 0"),
        ("algorithm", "cd", "`algorithm` must be one of .*'bso'.*, got 'cd'"),
        ("block_size", 0, "`block_size` must be an integer >= 1, got 0"),
        ("grad_dtype", "float16", "`grad_dtype` must be one of 'float32', 'bfloat16', got 'float16'"),
        ("refits", -1, "`refits` must be an integer >= 0, got -1"),
        ("refit_samples", 0, "`refit_samples` must be an integer >= 1, got 0"),
        ("sparsity", 90, r"`sparsity` must be in \[0, 1\), got 90. Give a fraction, not a percentage"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner(**{argument: value})


# data and loss


def test_no_sample_is_refused(tiny: Any) -> None:
    refused(tiny, pruner(), [], "there is no calibration sample. Give a dataloader with at least one batch")


def test_no_data_is_refused(tiny: Any) -> None:
    refused(tiny, pruner(), None, "chita needs data. Give `dataloader`")


@pytest.mark.parametrize("algorithm", ["bso", "block"])
def test_more_gradients_than_samples_is_a_warning_and_all_are_used(
    algorithm: str, tiny: Any, loader: DataLoader
) -> None:
    samples = len(loader.dataset)
    callback = pruner(num_grads=5000, algorithm=algorithm)
    with pytest.warns(UserWarning, match=f"`num_grads`=5000 gradients are more than the {samples} calibration samples"):
        receipt = prune(tiny, callback, batches_with(loader), entropy)
    assert any(f"of {samples} gradient rows of 1 samples" in note for note in receipt.notes)
    assert receipt.reached["kept"] == 94


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ["bso", "iht", "block"])
def test_a_gradient_that_is_not_finite_names_its_batch(
    algorithm: str, bad: float, tiny: Any, loader: DataLoader
) -> None:
    data = batches_with(loader, lambda index, x: x + bad if index == 2 else x)
    refused(tiny, pruner(algorithm=algorithm), data, "calibration batch 2 is not finite")


def test_weights_that_are_not_finite_are_refused(tiny: Any, loader: DataLoader) -> None:
    with torch.no_grad():
        tiny.hidden.weight[0, 0] = float("inf")
    data = batches_with(loader)
    before, states = tiny.hidden.weight.detach().clone(), rng_states()
    with pytest.raises(ValueError, match="not finite"):
        prune(tiny, pruner(), data, entropy)
    assert torch.equal(tiny.hidden.weight, before)
    assert torch.equal(rng_states()["torch"], states["torch"])


class Silent(nn.Module):
    """A loss that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda module, batch: module.inner(batch[0].flatten(1)).mean(0), "must return a scalar loss tensor"),
        (lambda module, batch: None, "must return a scalar loss tensor"),
        (lambda module, batch: torch.zeros(()), "does not depend on"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str, loader: DataLoader) -> None:
    refused(Silent(), pruner(), batches_with(loader), message, loss_fn=loss)


def test_a_module_without_a_loss_is_refused(loader: DataLoader) -> None:
    refused(Silent(), pruner(), batches_with(loader), "Silent has no `training_step`", loss_fn=None)


def test_a_loss_of_whole_batches_only_gives_one_row_per_batch(tiny: Any, loader: DataLoader) -> None:
    def paired(module: nn.Module, batch: Any) -> Tensor:
        first, second = batch[0].view(2, 2, *batch[0].shape[1:])  # the batch is two pairs, no more and no less
        return (module(first) - module(second)).square().mean()

    data = batches_with(loader)
    with pytest.warns(UserWarning, match=r"the loss of a part of a calibration batch cannot be had \(RuntimeError"):
        receipt = prune(tiny, pruner(num_grads=4), data, paired)
    assert any("of 4 gradient rows of whole batches" in note for note in receipt.notes)
    assert receipt.reached["kept"] == 94


# the solve


@pytest.mark.parametrize("algorithm", ["bso", "iht", "block"])
def test_a_gram_matrix_that_is_not_positive_advises_a_larger_ridge(algorithm: str, loader: DataLoader) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x, y = next(iter(DataLoader(loader.dataset, batch_size=1)))
    data = [(x.expand(16, 1, 4, 4), y.expand(16))]  # one sample again and again: equal rows, and no ridge to speak of
    callback = pruner(algorithm=algorithm, ridge=1e-300, first_order=False, metric=0.0)
    refused(net, callback, data, "Gram matrix .* is not positive. Choose a larger `ridge`")


def test_a_solve_that_fails_in_a_later_stage_changes_nothing(
    tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    honest = _chita_stages.run_stage

    def second_fails(*arguments: Any, **more: Any) -> Any:
        seen.append(0.0)
        if len(seen) == 2:
            raise ValueError("the Gram matrix of the gradients plus the ridge is not positive.")
        return honest(*arguments, **more)

    monkeypatch.setattr(_chita_stages, "run_stage", second_fails)
    refused(tiny, pruner(stages=3), batches_with(loader), "is not positive")
    assert len(seen) == 2


def test_a_failed_solve_in_a_fit_changes_nothing(tiny: Any, loader: DataLoader) -> None:
    images = torch.stack([image for image, _ in loader.dataset])
    labels = torch.tensor([int(label) for _, label in loader.dataset])
    images[5] = float("nan")
    data = DataLoader(TensorDataset(images, labels), batch_size=4)
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    states: list[dict[str, Any]] = []

    class Noting(CHITA):
        def propose(self, context: Any) -> Any:
            states.append(rng_states())
            return super().propose(context)

    trainer = trainer_of(Noting(**{**SMALL, "num_grads": 24, "grad_batch": 1}, measure=False))
    with pytest.raises(ValueError, match=r"calibration batch \d is not finite"):
        trainer.fit(tiny, data)
    assert_untouched(tiny, before, states[0])


# memory


@pytest.mark.parametrize("algorithm", ["bso", "block"])
def test_a_matrix_larger_than_what_is_free_is_refused_before_any_work(
    algorithm: str, tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(module: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return entropy(module, batch)

    monkeypatch.setattr(_chita_room, "free_bytes", lambda device: 7000)
    message = (
        r"8 gradients of 188 weights need about .* Lower `num_grads`, use grad_dtype='bfloat16' .*offload='FOLDER' .*"
        "algorithm='block'"
    )
    refused(tiny, pruner(algorithm=algorithm), batches_with(loader), message, loss_fn=counted)
    assert len(calls) <= 1  # whether the loss of a part of a batch can be had


@pytest.mark.parametrize(
    ("change", "free"),
    [({}, 31_616), ({"grad_dtype": "bfloat16"}, 28_608), ({"algorithm": "block"}, 30_080), ({"num_grads": 4}, 27_456)],
)
def test_the_estimate_counts_rows_storage_and_the_square_matrices(
    change: dict[str, Any], free: int, tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 8 x 188 numbers of 4 bytes: 6,016; 32 vectors of 188: 24,064; three 8 x 8 matrices of 8 bytes: 1,536
    monkeypatch.setattr(_chita_room, "free_bytes", lambda device: free - 1)
    refused(tiny, pruner(**change), batches_with(loader), "GiB are free")
    monkeypatch.setattr(_chita_room, "free_bytes", lambda device: free)
    prune(tiny, pruner(**change), batches_with(loader), entropy)
    assert MaskManager.of(tiny).counts() == (94, 188)


def test_the_estimate_counts_the_samples_there_are(
    tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 24 x 188 numbers and 32 vectors of 188: 42,112; three 24 x 24 matrices: 13,824
    monkeypatch.setattr(_chita_room, "free_bytes", lambda device: 42_112 + 13_824)
    with pytest.warns(UserWarning, match="are more than the 24 calibration samples"):
        prune(tiny, pruner(num_grads=5000), batches_with(loader), entropy)
    assert MaskManager.of(tiny).counts() == (94, 188)


def test_free_memory_is_known_on_this_machine_or_taken_as_enough() -> None:
    free = _chita_room.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    _chita_room.check_memory(10, 10, torch.float32, torch.device("cpu"))


# sharded parameters


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    """A device mesh of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_parameters_are_refused(mesh: Any, tiny: Any, loader: DataLoader) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(tiny, mesh=mesh)
    with pytest.raises(MisconfigurationException, match=r"chita cannot score sharded parameters \(FSDP\)"):
        prune(tiny, pruner(), batches_with(loader), entropy)
    assert MaskManager.of(tiny).masks == {}
