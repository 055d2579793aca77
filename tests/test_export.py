"""Exports: what they hold, that they give the module's outputs, and what is refused."""

from __future__ import annotations

import builtins
import importlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_prune import export as exports
from lightning_prune.export import CsrLinear, PackedLinear, to_onnx, to_program, to_safetensors, to_sparse
from lightning_prune.masks import MaskManager


def sparse_layer(sparsity: float = 0.8, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(12, 9, bias=bias)
    with torch.no_grad():
        layer.weight[torch.rand(9, 12) < sparsity] = 0
        layer.weight[:, 3] = 0
        layer.weight[5] = 0
    return layer


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def test_safetensors_hold_the_state(tmp_path):
    module = net()
    module[3].weight = nn.Parameter(module[0].weight[:3].detach().repeat(1, 2)[:, :16])
    export = to_safetensors(module, tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert set(tensors) == set(module.state_dict())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert export.bytes == (tmp_path / "m.safetensors").stat().st_size


def test_tied_tensors_are_written_under_both_names(tmp_path):
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    to_safetensors(module, tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == {"a.weight", "b.weight"}


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ValueError, match="must hold tensors only, got dict in '_extra_state'"):
        to_safetensors(Odd(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [CsrLinear, PackedLinear])
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 5, 12)])
def test_sparse_forms_equal_the_dense_layer(form, shape, bias):
    layer, x = sparse_layer(bias=bias), torch.randn(shape)
    assert torch.allclose(form(layer)(x), layer(x), atol=1e-6)


def test_sparse_copy_gives_the_same_outputs_and_says_what_it_chose():
    module, x = nn.Sequential(sparse_layer(), nn.ReLU(), nn.Linear(9, 3)), torch.randn(4, 12)
    small, export = to_sparse(module, x, max_seconds=0.05)
    assert torch.allclose(small(x), module(x), atol=1e-6)
    assert len(export.notes) == 1
    assert export.notes[0].startswith(("0 stays dense: ", "0 runs in CSR form: ", "0 runs in packed form: "))
    assert type(module[0]) is nn.Linear
    assert {"masked", "exported"} == set(export.milliseconds)


def test_a_form_that_is_faster_is_taken(monkeypatch):
    times = {"dense": 3.0, "CSR": 2.0, "packed": 2.5}
    monkeypatch.setattr(exports, "_medians", lambda *_: times)
    module, x = nn.Sequential(sparse_layer()), torch.randn(4, 12)
    assert isinstance(to_sparse(module, x, max_seconds=0.05)[0][0], CsrLinear)
    times["packed"] = 1.0
    assert isinstance(to_sparse(module, x, max_seconds=0.05)[0][0], PackedLinear)
    times.update(dense=1.01)
    assert type(to_sparse(module, x, max_seconds=0.05)[0][0]) is nn.Linear


def test_dense_layers_are_not_tried():
    _, export = to_sparse(net(), torch.randn(4, 12), max_seconds=0.05)
    assert export.notes == ["No linear layer has a sparsity of 0.5 or more; all stay dense."]


def test_masked_modules_are_timed_against_their_dense_twin():
    module, x = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 2)), torch.randn(4, 12)
    MaskManager.of(module).set_masks({"0.weight": torch.rand(9, 12) < 0.2})
    _, export = to_sparse(module, x, max_seconds=0.05)
    assert {"dense", "masked", "exported"} == set(export.milliseconds)


def test_program_runs_at_other_batch_sizes(tmp_path):
    module, x = net().eval(), torch.randn(4, 12)
    export = to_program(module, x, tmp_path / "m.pt2", max_seconds=0.05)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for count in (4, 7):
        x = torch.randn(count, 12)
        assert torch.allclose(loaded(x), module(x), atol=1e-6)
    assert export.error < 1e-5
    assert export.bytes == (tmp_path / "m.pt2").stat().st_size


def test_a_program_that_cannot_be_made_leaves_no_file(tmp_path):
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ValueError, match="`module` must be exportable, got Branch"):
        to_program(Branch(), torch.ones(2), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_onnx_agrees_with_torch_at_other_batch_sizes(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x = net().eval(), torch.randn(4, 12)
    export = to_onnx(module, x, tmp_path / "m.onnx", max_seconds=0.05)
    assert export.error < 1e-5
    assert export.bytes == (tmp_path / "m.onnx").stat().st_size
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(7, 12)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.allclose(found, module(x), atol=1e-5)


def test_an_onnx_export_that_fails_leaves_no_file(tmp_path):
    pytest.importorskip("onnxruntime")

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ValueError, match="`module` must be exportable to ONNX, got Odd"):
        to_onnx(Odd(), torch.ones(2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_onnxruntime_is_named(tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == "onnxruntime":
            raise builtins.ImportError("no such module")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"needs onnxruntime. Install it with pip install 'lightning-prune\[onnx\]'"):
        to_onnx(net(), torch.randn(4, 12), tmp_path / "m.onnx")


def test_an_export_with_other_outputs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "difference", lambda *_: 0.1)
    with pytest.raises(ValueError, match=r"the export differs from the module by 1.0e-01"):
        to_program(net(), torch.randn(4, 12), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [to_onnx, to_program])
def test_time_to_measure_must_be_positive(tmp_path, function):
    with pytest.raises(ValueError, match="`max_seconds` must be a finite number above 0"):
        function(net(), torch.randn(4, 12), tmp_path / "m", max_seconds=0.0)
