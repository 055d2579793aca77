"""MaskManager: files, states, and the life of a manager."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from typing import Any

import pytest
import torch
from mask_helpers import assert_equal_trees, nothing_kept, pruned_values, random_masks, small_net, snapshot, train
from safetensors.torch import save_file
from torch import nn, tensor

from lightning_prune.masks import MaskManager, read_masks


def test_saved_masks_load_into_another_copy_of_the_model(tmp_path):
    net, other = small_net(), small_net()
    masks = random_masks(net)
    MaskManager.of(net).set_masks(masks)
    path = tmp_path / "deep" / "masks.safetensors"
    MaskManager.of(net).save(path)
    MaskManager.of(other).load(str(path))
    assert_equal_trees(MaskManager.of(other).masks, masks)
    assert (pruned_values(other) == 0).all()
    assert os.listdir(path.parent) == ["masks.safetensors"]


def test_loading_intersects_unless_asked_to_regrow(tmp_path):
    layer = nn.Linear(4, 1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, True, False, False]])})
    manager.save(tmp_path / "masks")
    manager.set_masks({"weight": tensor([[True, False, True, True]])})
    manager.load(tmp_path / "masks")
    assert manager.masks["weight"].tolist() == [[True, False, False, False]]
    manager.load(tmp_path / "masks", regrow=True)
    assert manager.masks["weight"].tolist() == [[True, True, False, False]]


def test_no_masks_make_a_file_that_loads(tmp_path):
    MaskManager.of(small_net()).save(tmp_path / "masks")
    assert read_masks(tmp_path / "masks") == {}


def test_a_mask_file_needs_nothing_but_safetensors(tmp_path):
    """Eight bytes of length, a JSON header, the bytes: readable by a script that knows no torch."""
    layer = nn.Linear(2, 1)
    MaskManager.of(layer).set_masks({"weight": tensor([[True, False]])})
    MaskManager.of(layer).save(tmp_path / "masks")
    content = (tmp_path / "masks").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["weight"]["dtype"] == "BOOL"
    assert header["weight"]["shape"] == [1, 2]
    assert header["__metadata__"]["format"] == "lightning_prune.masks"
    assert content[8 + length :] == b"\x01\x00"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mask file .*nowhere"):
        MaskManager.of(small_net()).load(tmp_path / "nowhere")


def test_a_file_cut_anywhere_is_refused_and_changes_nothing(tmp_path):
    net = small_net()
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    manager.save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    before = snapshot(net)
    for length in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is truncated or no safetensors file"):
            manager.load(tmp_path / "cut")
    assert_equal_trees(snapshot(net), before)


@pytest.mark.parametrize("content", [b"", b"not a mask file at all", b"\xff" * 64, b"PK\x03\x04" + bytes(100)])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        MaskManager.of(small_net()).load(tmp_path / "other")


def test_weights_in_place_of_masks_are_refused(tmp_path):
    net = small_net()
    save_file(net.state_dict(), tmp_path / "weights")
    with pytest.raises(ValueError, match=r"holds no masks \(format None\)"):
        MaskManager.of(net).load(tmp_path / "weights")
    assert MaskManager.of(net).masks == {}


def test_masks_of_another_model_are_refused_and_change_nothing(tmp_path):
    net = small_net()
    wider = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    deeper = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3))
    before = snapshot(net)
    for other, message in ((wider, "It belongs to another model"), (deeper, r"'3\.weight' is no parameter")):
        MaskManager.of(other).set_masks(random_masks(other))
        MaskManager.of(other).save(tmp_path / "masks")
        with pytest.raises(ValueError, match=message):
            MaskManager.of(net).load(tmp_path / "masks")
    assert_equal_trees(snapshot(net), before)


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    layer = nn.Linear(2, 1)
    manager = MaskManager.of(layer)
    manager.set_masks({"weight": tensor([[True, False]])})
    manager.save(tmp_path / "masks")
    manager.set_masks({"weight": tensor([[False, False]])})

    def fail(tensors: Any, path: Any, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lightning_prune.masks.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        manager.save(tmp_path / "masks")
    assert read_masks(tmp_path / "masks")["weight"].tolist() == [[True, False]]
    assert os.listdir(tmp_path) == ["masks"]


def test_a_loaded_state_is_put_in_force_exactly_whatever_was_before():
    """A checkpoint may lie in the past: its dense weights must stay dense."""
    net = small_net()
    masks = random_masks(net)
    manager = MaskManager.of(net)
    manager.set_masks({"2.weight": masks["2.weight"]})
    past = manager.state_dict()
    manager.set_masks(random_masks(net, 0.3, seed=1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)  # the weights of the checkpoint
    manager.load_state_dict(past)
    assert_equal_trees(manager.masks, past)
    assert net[0].weight.all()
    assert torch.equal(net[2].weight != 0, masks["2.weight"])
    manager.load_state_dict({})
    assert manager.masks == {}


def test_a_refused_state_changes_nothing():
    net = small_net()
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    before = snapshot(net)
    for state in ({"9.weight": nothing_kept()}, {"0.weight": nothing_kept((1, 1))}, {"0.weight": torch.ones(8, 6)}):
        with pytest.raises(ValueError, match="weight"):
            manager.load_state_dict({"2.weight": nothing_kept((3, 8)), **state})
    assert_equal_trees(snapshot(net), before)


def test_the_state_loads_from_a_checkpoint_without_unpickling_code(tmp_path):
    net = small_net()
    MaskManager.of(net).set_masks(random_masks(net))
    torch.save(MaskManager.of(net).state_dict(), tmp_path / "state.ckpt")
    loaded = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert_equal_trees(loaded, MaskManager.of(net).masks)


def test_a_manager_does_not_keep_its_module_alive():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    manager = MaskManager.of(net)
    manager.set_masks(random_masks(net))
    manager.attach([optimizer])
    train(net, optimizer, 2)
    module, kept = weakref.ref(net), weakref.ref(manager)
    manager.detach()
    del net, optimizer, manager
    gc.collect()
    assert module() is None
    assert kept() is None


def test_a_manager_without_its_module_says_so():
    manager = MaskManager.of(small_net())
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        manager.set_masks({})


def test_a_deep_copy_has_the_zeros_and_a_manager_of_its_own():
    net = small_net()
    masks = random_masks(net)
    MaskManager.of(net).set_masks(masks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    MaskManager.of(net).attach([optimizer])
    twin = copy.deepcopy(net)
    assert_equal_trees(twin.state_dict(), net.state_dict())
    assert MaskManager.of(twin).masks == {}
    MaskManager.of(twin).set_masks(MaskManager.of(net).masks)
    MaskManager.of(twin).clear()
    assert_equal_trees(MaskManager.of(net).masks, masks)
    MaskManager.of(net).detach()


def test_a_masked_module_is_pickled_whole(tmp_path):
    net = small_net()
    MaskManager.of(net).set_masks(random_masks(net))
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert_equal_trees(loaded.state_dict(), net.state_dict())
