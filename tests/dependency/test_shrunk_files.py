"""A shrunk module on disk: weights and widths in one safetensors file."""

from __future__ import annotations

import pytest
import torch
from dependency_nets import NETS
from safetensors.torch import save_file

from lightning_prune import load_shrunk, shrink
from lightning_prune.shrink import report_of, save_shrunk


@pytest.mark.parametrize("name", ["residual", "heads", "torch_attention", "tied", "recurrent"])
def test_saved_module_comes_back_equal(tmp_path, name):
    factory, example, expected = NETS[name]
    module, inputs = factory(), example()
    count = max(units for units, _ in expected)
    small = shrink(module, inputs, {group: torch.arange(n) < n // 2 for group, n in _groups(name, count).items()})
    path = tmp_path / "small.safetensors"
    save_shrunk(small, path)
    back = load_shrunk(factory, path)
    assert torch.equal(back.eval()(*inputs), small.eval()(*inputs))
    assert report_of(back).units == report_of(small).units
    assert report_of(back).params == report_of(small).params


def _groups(name: str, count: int) -> dict[str, int]:
    first = {"residual": "a", "heads": "q", "torch_attention": "m", "tied": "h", "recurrent": "g"}[name]
    return {first: count}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.safetensors"):
        load_shrunk(NETS["residual"][0], tmp_path / "gone.safetensors")


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_shrunk(NETS["residual"][0], path)


def test_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no shrunk module"):
        load_shrunk(NETS["residual"][0], path)


def test_factory_of_another_model_is_refused(tmp_path):
    factory, example, _ = NETS["residual"]
    path = tmp_path / "small.safetensors"
    save_shrunk(shrink(factory(), example(), {"a": torch.arange(8) < 3}), path)
    with pytest.raises(ValueError, match="The plan belongs to another model"):
        load_shrunk(NETS["gated"][0], path)
    with pytest.raises(ValueError, match=r"`factory` must return a torch\.nn\.Module, got int"):
        load_shrunk(lambda: 3, path)  # type: ignore[arg-type, return-value]


def test_module_that_was_not_shrunk_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="must come from shrink"):
        save_shrunk(NETS["residual"][0](), tmp_path / "x.safetensors")
