"""The sensitivities of layers: chunked grouped convolutions against im2col, and what they must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.pfp_oracles import naive_shares, terms_of
from torch import Tensor, nn

from lightning_prune.methods._pfp_kernel import MODES, Reader, dropped_mass, error_moments, unit_shares

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "5x5 same": {"kernel_size": 5, "padding": "same"},
    "stride": {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "reflect": {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect"},
}
ONE_EACH = torch.arange(6)[:, None]
PAIRS = torch.tensor([[0, 3], [4, 1], [2, 5]])


def convolution(name: str, signed: bool = True) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, dtype=torch.float64, **CONVOLUTIONS[name])
    inputs = torch.randn(4, 6, 8, 7, dtype=torch.float64)
    return layer, inputs if signed else inputs.relu()


def shares(layer: nn.Module, inputs: Tensor, units: Tensor = ONE_EACH, mode: str = "abs", **options: Any) -> Tensor:
    return unit_shares(*Reader.of(layer, units).events(inputs), mode, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_chunked_convolutions_equal_im2col(name: str, signed: bool, reduction: str, mode: str) -> None:
    layer, inputs = convolution(name, signed)
    expected = naive_shares(layer, inputs, ONE_EACH, mode, reduction)
    assert float(expected.min()) > 0
    found = shares(layer, inputs, mode=mode, reduction=reduction)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_elements", [1, 100, 700, 5000, 2**24])
def test_chunks_of_any_size_give_the_same(max_elements: int) -> None:
    layer, inputs = convolution("3x3")
    whole = shares(layer, inputs)
    assert torch.allclose(shares(layer, inputs, max_elements=max_elements), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_elements", [1, 300, 2**24])
def test_no_temporary_is_larger_than_asked_where_one_unit_fits(max_elements: int) -> None:
    layer, inputs = convolution("3x3")
    reader, rows = Reader.of(layer, ONE_EACH).events(inputs)
    smallest = 5 * 8 * 7
    sizes = [reader.each(rows[some], reader.weight, units).numel() for some, units in reader.chunks(rows, max_elements)]
    assert max(sizes) <= max(max_elements, smallest)
    assert sum(sizes) == 4 * 6 * smallest


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_of_several_inputs_is_their_sum(mode: str) -> None:
    layer, inputs = convolution("stride")
    expected = naive_shares(layer, inputs, PAIRS, mode)
    assert torch.allclose(shares(layer, inputs, PAIRS, mode), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 2, 3, 6)])
def test_linear_layers_read_tokens_as_positions(shape: tuple[int, ...], mode: str) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 5, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)
    for units in (ONE_EACH, PAIRS):
        found = shares(layer, inputs, units, mode, max_elements=40)
        assert torch.allclose(found, naive_shares(layer, inputs, units, mode), rtol=0, atol=1e-12)


def test_convolutions_of_one_and_three_dims_equal_their_two_dimensional_twins() -> None:
    layer, inputs = convolution("3x3")
    flat = nn.Conv1d(6, 5, 3, padding=1, dtype=torch.float64)
    flat.weight.data = layer.weight.data[:, :, 1]
    narrow = nn.Conv2d(6, 5, (1, 3), padding=(0, 1), dtype=torch.float64)
    narrow.weight.data = layer.weight.data[:, :, 1:2]
    deep = nn.Conv3d(6, 5, (1, 1, 3), padding=(0, 0, 1), dtype=torch.float64)
    deep.weight.data = layer.weight.data[:, :, 1:2, None]
    row = inputs[:, :, 0]
    expected = shares(narrow, row[:, :, None])
    assert torch.allclose(shares(flat, row), expected, rtol=0, atol=1e-14)
    assert torch.allclose(shares(deep, row[:, :, None, None]), expected, rtol=0, atol=1e-14)


def test_absolute_shares_do_not_exceed_split_ones() -> None:
    for signed in (True, False):
        layer, inputs = convolution("3x3", signed)
        assert bool((shares(layer, inputs) <= shares(layer, inputs, mode="split") + 1e-12).all())


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_lies_between_one_and_the_number_of_units(mode: str) -> None:
    layer, inputs = convolution("3x3")
    total = float(shares(layer, inputs, mode=mode).amax(0).sum())
    assert 1 <= total <= 6


# what the sensitivities must not depend on


def test_scaling_a_unit_against_its_weights_changes_nothing() -> None:
    layer, inputs = convolution("3x3")
    before, factor = shares(layer, inputs), torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5, 7.0], dtype=torch.float64)
    layer.weight.data = layer.weight.data / factor.view(1, 6, 1, 1)
    assert torch.allclose(shares(layer, inputs * factor.view(1, 6, 1, 1)), before, rtol=0, atol=1e-13)


def test_scaling_and_permuting_outputs_changes_nothing() -> None:
    layer, inputs = convolution("3x3")
    before = shares(layer, inputs)
    layer.weight.data = layer.weight.data[[3, 0, 4, 1, 2]] * torch.rand(5, 1, 1, 1, dtype=torch.float64)
    assert torch.allclose(shares(layer, inputs), before, rtol=0, atol=1e-13)


def test_bias_and_repeated_data_change_nothing() -> None:
    layer, inputs = convolution("3x3")
    before = shares(layer, inputs).amax(0)
    layer.bias.data.fill_(100.0)
    assert torch.equal(shares(layer, torch.cat([inputs, inputs])).amax(0), before)


def test_batches_one_after_the_other_give_what_one_batch_gives() -> None:
    layer, inputs = convolution("3x3")
    one_by_one = torch.stack([shares(layer, sample[None])[0] for sample in inputs])
    assert torch.allclose(one_by_one, shares(layer, inputs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_input_or_an_unread_one_has_no_sensitivity(mode: str) -> None:
    layer, inputs = convolution("3x3")
    inputs[:, 2] = 0
    layer.weight.data[:, 4] = 0
    score = shares(layer, inputs, mode=mode).amax(0)
    assert score[[2, 4]].tolist() == [0.0, 0.0]
    assert float(score[[0, 1, 3, 5]].min()) > 0


def test_equal_units_have_equal_sensitivities() -> None:
    layer, inputs = convolution("3x3")
    layer.weight.data = layer.weight.data[:, :1].expand(-1, 6, -1, -1).clone()
    score = shares(layer, inputs[:, :1].expand(-1, 6, -1, -1).clone())
    assert torch.allclose(score, torch.full_like(score, 1 / 6), rtol=0, atol=1e-12)


def test_sixteen_bit_inputs_are_computed_in_single_precision() -> None:
    layer, inputs = convolution("3x3")
    small = layer.to(torch.bfloat16)
    found = shares(small, inputs.to(torch.bfloat16))
    assert found.dtype == torch.float32
    exact = shares(small.double(), inputs.to(torch.bfloat16).double())
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-6)


# random patches


def test_random_patches_are_patches_of_the_same_sample() -> None:
    layer, inputs = convolution("dilation")
    reader, rows = Reader.of(layer, PAIRS).events(inputs)
    flat, chosen = reader.sampled(rows, 7, torch.Generator().manual_seed(0))
    assert chosen.shape == (4, 6 * 9, 7)
    every, some = reader.total(rows), flat.total(chosen)
    nearest = (every[..., None] - some[:, :, None]).abs().amax(1)  # (samples, all positions, chosen)
    assert float(nearest.amin(1).max()) < 1e-12
    mass, whole = (
        part.abs().sum(-1) for part in (terms_of(layer, inputs, ONE_EACH)[1], terms_of(layer, inputs, PAIRS)[1])
    )
    assert torch.allclose(mass, whole)
    assert bool((unit_shares(flat, chosen) <= unit_shares(reader, rows) + 1e-12).all())


def test_fewer_patches_than_asked_for_are_all_taken() -> None:
    layer, inputs = convolution("stride")
    reader, rows = Reader.of(layer, PAIRS).events(inputs)
    assert reader.sampled(rows, 10**6, torch.Generator())[0] is reader


# masses and moments


def test_dropped_mass_and_moments_equal_sums_over_im2col() -> None:
    layer, inputs = convolution("stride")
    reader, rows = Reader.of(layer, PAIRS).events(inputs)
    terms, mass, _, _ = terms_of(layer, inputs, PAIRS)
    whole = mass.sum(-1)
    kept = torch.tensor([True, False, False])
    assert torch.allclose(dropped_mass(reader, rows, kept), mass[..., 1:].sum(-1) / whole, rtol=0, atol=1e-12)
    factors = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    raw, variance = error_moments(reader, rows, factors, 4, max_elements=50)
    expected = (terms.square() * factors).sum(-1) / whole.square()
    assert torch.allclose(raw, expected, rtol=0, atol=1e-12)
    drawn = terms[..., 1:].sum(-1).square() / whole.square() / 4
    assert torch.allclose(variance, (expected - drawn).clamp_min(0), rtol=0, atol=1e-12)


# refusals


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be linear or a convolution of one group, got Conv2d 'deep'"):
        Reader.of(nn.Conv2d(4, 4, 3, groups=2), torch.arange(4)[:, None], "deep")
    with pytest.raises(ValueError, match="got LayerNorm 'norm'"):
        Reader.of(nn.LayerNorm(4), torch.arange(4)[:, None], "norm")


def test_a_weight_or_an_input_that_is_not_finite_is_refused_by_name() -> None:
    layer, inputs = convolution("3x3")
    inputs[1, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="input of 'conv' is not finite on a calibration batch"):
        Reader.of(layer, ONE_EACH, "conv").events(inputs)
    layer.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'conv' is not finite"):
        Reader.of(layer, ONE_EACH, "conv")
