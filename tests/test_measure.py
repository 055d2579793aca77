"""FLOPs, parameters, bytes and milliseconds against hand arithmetic; nothing measured may leave a trace."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune import measure
from lightning_prune.measure import (
    Timing,
    count_flops,
    count_parameters,
    file_bytes,
    flop_blind_spots,
    forward_inputs_batch_size,
    measure_milliseconds,
    weight_bytes,
)


class Noisy(nn.Module):
    """Draws from every random generator in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1) + random.random() + float(np.random.rand())


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no forward today")


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Clock:
    """A clock that only modules move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Ticking(nn.Module):
    """Takes the next of the given seconds on a clock and records that it ran."""

    def __init__(self, clock: Clock, seconds: list[float], record: list[str], name: str) -> None:
        super().__init__()
        self.clock, self.seconds, self.record, self.label = clock, cycle(seconds), record, name

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += next(self.seconds)
        self.record.append(self.label)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def generator_states() -> tuple[list[int], object, list[int]]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_a_linear_layer_takes_two_flops_per_weight_and_sample() -> None:
    assert count_flops(nn.Linear(8, 4), (torch.randn(3, 8),)) == 2 * 3 * 8 * 4


def test_a_convolution_takes_two_flops_per_output_and_kernel_entry() -> None:
    convolution = nn.Conv2d(4, 6, kernel_size=3, groups=2)
    assert count_flops(convolution, (torch.randn(2, 4, 7, 5),)) == 2 * (2 * 6 * 5 * 3) * (2 * 3 * 3)


def test_a_lone_tensor_and_named_inputs_count_the_same() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    assert count_flops(layer, x) == count_flops(layer, (), {"input": x}) == 192


def test_zeros_in_a_dense_weight_save_no_flops() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    dense = count_flops(layer, x)
    with torch.no_grad():
        layer.weight.zero_()
    assert count_flops(layer, x) == dense


def test_the_fused_encoder_layer_does_not_hide_its_linear_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    tokens = 2 * 5
    linear = 2 * tokens * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8)
    attention = 2 * (2 * 2 * 2 * 5 * 5 * 4)
    # the two attention products are counted or not, depending on the kernel torch chooses
    assert count_flops(layer, torch.randn(2, 5, 8)) in (linear, linear + attention)


def test_the_fused_kernel_is_switched_back_on_even_after_a_failure() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="no forward today"):
        count_flops(Failing(), torch.randn(3, 8))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_module_counts_like_the_plain_one() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(8, 4), backend="eager"), nn.ReLU())
    assert count_flops(model, torch.randn(3, 8)) == 192


def test_recurrent_and_attention_modules_are_named_as_blind_spots() -> None:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.EmbeddingBag(3, 4), nn.Linear(4, 4)])
    assert flop_blind_spots(model) == ["EmbeddingBag", "LSTM", "MultiheadAttention"]


def test_a_plain_network_has_no_blind_spot() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2))
    assert flop_blind_spots(model, torch.randn(1, 2, 5)) == []


def test_functional_attention_is_named_exactly_where_the_counter_misses_it() -> None:
    x = torch.randn(1, 2, 5, 8)
    missed = count_flops(Attention(), x) == 0
    assert flop_blind_spots(Attention(), x) == (["scaled_dot_product_attention"] if missed else [])
    assert flop_blind_spots(Attention()) == []


def test_a_tied_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 36 + 6


def test_a_parameter_that_views_the_memory_of_another_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    model[1].weight.data = model[0].weight.data.t()
    assert count_parameters(model) == 12


def test_parameters_without_data_are_counted() -> None:
    assert count_parameters(nn.Linear(6, 5, device="meta")) == 35


def test_a_lazy_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lazy parameter 'weight'. Run one batch first"):
        count_parameters(nn.LazyLinear(3))


def test_weight_bytes_are_numel_times_element_size() -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16), "c": torch.tensor(1)}
    assert weight_bytes(tensors) == 15 * 4 + 7 * 2 + 8


def test_weight_bytes_of_a_tied_tensor_count_once() -> None:
    shared = torch.zeros(3, 5)
    assert weight_bytes({"a": shared, "b": shared, "c": shared.t(), "first row": shared[0]}) == 15 * 4 + 5 * 4


@pytest.mark.parametrize("measured", [weight_bytes, lambda tensors: file_bytes(tensors, compress=False)])
def test_a_sparse_tensor_is_refused(measured: object) -> None:
    with pytest.raises(ValueError, match=r"must be dense, got torch.sparse_coo for 'w'"):
        measured({"w": torch.eye(2).to_sparse()})  # type: ignore[operator]


def test_a_tensor_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold data, got a meta tensor for 'w'"):
        weight_bytes({"w": torch.empty(2, device="meta")})


def test_file_bytes_are_those_of_the_safetensors_file(tmp_path: Path, temporary_folder: Path) -> None:
    tensors = {"a": torch.randn(30, 5), "b": torch.ones(7, dtype=torch.bool)}
    save_file(tensors, tmp_path / "reference")
    assert file_bytes(tensors, compress=False) == (tmp_path / "reference").stat().st_size


def test_compressed_bytes_are_those_of_zlib_over_the_file(tmp_path: Path, temporary_folder: Path) -> None:
    tensors = {"a": torch.randn(300, 5), "b": torch.zeros(700)}
    save_file(tensors, tmp_path / "reference")
    content = (tmp_path / "reference").read_bytes()
    assert file_bytes(tensors, compress=True) == len(zlib.compress(content, 6)) < len(content) - 2000


def test_compressing_in_many_chunks_gives_nearly_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(300, 5), "b": torch.zeros(700)}
    whole = file_bytes(tensors, compress=True)
    monkeypatch.setattr(measure, "_CHUNK", 100)
    assert file_bytes(tensors, compress=True) == pytest.approx(whole, rel=0.02)


def test_a_tied_tensor_is_written_once(temporary_folder: Path) -> None:
    shared = torch.randn(1000)
    assert file_bytes({"a": shared, "b": shared}, compress=False) == file_bytes({"a": shared}, compress=False)


def test_slices_of_one_memory_are_written_each(temporary_folder: Path) -> None:
    whole = torch.randn(1000)
    size = file_bytes({"a": whole[:400], "b": whole[400:]}, compress=False)
    assert size == file_bytes({"a": torch.randn(400), "b": torch.randn(600)}, compress=False)


def test_strided_and_complex_tensors_are_written(temporary_folder: Path) -> None:
    strided = {"a": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    assert file_bytes(strided, compress=False) == file_bytes({"a": torch.randn(2, 3, 4, 4)}, compress=False)
    complex_size = file_bytes({"a": torch.zeros(6, dtype=torch.complex64)}, compress=False)
    assert complex_size == file_bytes({"a": torch.zeros(6, 2)}, compress=False)


def test_beyond_the_cap_only_the_compressed_size_is_left_out(temporary_folder: Path) -> None:
    tensors = {"a": torch.zeros(100)}
    assert file_bytes(tensors, compress=True, max_bytes=399) is None
    assert file_bytes(tensors, compress=True, max_bytes=400) is not None
    assert file_bytes(tensors, compress=False, max_bytes=0) is not None


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`max_bytes` must be >= 0 bytes, got -1"):
        file_bytes({"a": torch.zeros(1)}, compress=True, max_bytes=-1)


@pytest.mark.usefixtures("temporary_folder")
def test_a_failing_write_leaves_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(measure, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        file_bytes({"a": torch.zeros(1)}, compress=False)


def test_modules_run_in_turns_and_warm_up_is_not_measured(clock: Clock) -> None:
    record: list[str] = []
    modules = {name: Ticking(clock, [0.1], record, name) for name in "AB"}
    timings = measure_milliseconds(modules, torch.zeros(1), repeats=3, warmup=2)
    assert "".join(record) == "ABABABABAB"
    assert [timing.repeats for timing in timings.values()] == [3, 3]


def test_median_and_percentiles_are_those_of_the_measured_rounds(clock: Clock) -> None:
    seconds = {"steps": [float(second) for second in range(1, 12)], "steady": [0.25]}
    modules = {name: Ticking(clock, values, [], name) for name, values in seconds.items()}
    timings = measure_milliseconds(modules, torch.zeros(64, 3), repeats=11, warmup=0, max_seconds=100)
    steps, steady = timings["steps"], timings["steady"]
    assert (steps.low, steps.median, steps.high) == pytest.approx((2000, 6000, 10000))
    assert (steady.low, steady.median, steady.high) == pytest.approx((250, 250, 250))


def test_no_round_starts_after_the_time_limit(clock: Clock) -> None:
    record: list[str] = []
    module = Ticking(clock, [1.0], record, "A")
    assert measure_milliseconds({"A": module}, torch.zeros(1), warmup=2, max_seconds=4.5)["A"].repeats == 3
    assert len(record) == 2 + 3


def test_one_round_is_measured_even_when_warm_up_used_up_the_time(clock: Clock) -> None:
    record: list[str] = []
    module = Ticking(clock, [5.0], record, "A")
    timing = measure_milliseconds({"A": module}, torch.zeros(1), max_seconds=1.0)["A"]
    assert (len(record), timing.repeats, timing.median) == (2, 1, 5000.0)


def test_real_times_are_ordered_and_carry_their_conditions() -> None:
    timing = measure_milliseconds({"dense": nn.Linear(8, 4)}, (torch.randn(16, 8),), repeats=5)["dense"]
    assert 0 <= timing.low <= timing.median <= timing.high
    assert (timing.batch_size, timing.threads, timing.repeats) == (16, torch.get_num_threads(), 5)


def test_a_timing_becomes_plain_values() -> None:
    values = {"median": 2.0, "low": 1.0, "high": 3.0, "batch_size": None, "threads": 4, "repeats": 5}
    assert Timing(2.0, 1.0, 3.0, None, 4, 5).to_dict() == values


def test_the_device_is_idle_before_and_after_every_timed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    record: list[str] = []
    monkeypatch.setattr(measure, "_synchroniser", lambda modules: lambda: record.append("wait"))
    modules = {name: Ticking(Clock(), [0.0], record, name) for name in "AB"}
    measure_milliseconds(modules, torch.zeros(1), repeats=1, warmup=0)
    assert record == ["wait", "A", "wait", "wait", "B", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_on_a_gpu_is_timed_and_its_generator_untouched() -> None:
    layer = nn.Sequential(nn.Linear(8, 4), nn.Dropout()).cuda()
    before = torch.cuda.get_rng_state()
    x = torch.randn(3, 8, device="cuda")
    timing = measure_milliseconds({"dense": layer}, x, repeats=3)["dense"]
    assert count_flops(layer, x) == 192
    assert 0 < timing.low <= timing.median <= timing.high
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {}}, "`modules` must hold at least one module, got none"),
        ({"repeats": 0}, "`repeats` must be >= 1 round, got 0"),
        ({"warmup": -1}, "`warmup` must be >= 0 rounds, got -1"),
        ({"max_seconds": 0.0}, "`max_seconds` must be > 0 seconds, got 0.0"),
        ({"max_seconds": float("nan")}, "`max_seconds` must be > 0 seconds, got nan"),
    ],
)
def test_a_timing_argument_out_of_range_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"modules": {"dense": nn.Identity()}, "args": torch.zeros(1), **change}
    with pytest.raises(ValueError, match=message):
        measure_milliseconds(**arguments)  # type: ignore[arg-type]


MEASUREMENTS = [
    count_flops,
    lambda module, x: flop_blind_spots(module, x),
    lambda module, x: measure_milliseconds({"first": module, "again": module}, x, repeats=2),
]


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_random_generators_are_untouched(measurement: object) -> None:
    before = generator_states()
    measurement(Noisy(), torch.zeros(2))  # type: ignore[operator]
    assert generator_states() == before


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_training_flags_come_back_one_by_one(measurement: object) -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [part.training for part in model.modules()]
    assert before == [True, True, False, True, True]
    measurement(model, torch.randn(3, 4))  # type: ignore[operator]
    assert [part.training for part in model.modules()] == before
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_a_failing_forward_pass_leaves_flags_and_generators(measurement: object) -> None:
    model, before = nn.Sequential(Noisy(), Failing()), generator_states()
    with pytest.raises(RuntimeError, match="no forward today"):
        measurement(model, torch.zeros(2))  # type: ignore[operator]
    assert all(part.training for part in model.modules())
    assert generator_states() == before


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_the_module_runs_in_eval_mode_without_gradients_but_not_in_inference_mode(
    measurement: object,
) -> None:
    seen: set[tuple[bool, bool, bool]] = set()

    class Witness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return x

    measurement(Witness(), torch.zeros(2))  # type: ignore[operator]
    assert seen == {(False, False, False)}


@pytest.mark.parametrize(
    ("args", "kwargs", "size"),
    [
        (torch.zeros(5, 2), None, 5),
        ((torch.zeros(5, 2), torch.zeros(3)), None, 5),
        (([{"ids": torch.zeros(7, 2)}],), None, 7),
        ((torch.tensor(1.0), torch.zeros(4)), None, 4),
        ((), {"x": torch.zeros(6, 1)}, 6),
        (({"ids": torch.zeros(8, 2)}), None, 8),
        (("text", 3), {}, None),
    ],
)
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor(
    args: object, kwargs: dict[str, Tensor] | None, size: int | None
) -> None:
    assert forward_inputs_batch_size(args, kwargs) == size
