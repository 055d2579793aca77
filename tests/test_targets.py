"""Which tensors may be pruned: defaults, patterns, tied and compiled names, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_prune.targets import aliases, canonical_name, check_patterns, named_tensors, pick, select


class Net(nn.Module):
    """Names worth matching: a nested encoder, a head, a norm, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Double(nn.Module):
    """Doubles a weight: the simplest parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


DEFAULT = ["encoder.0.weight", "encoder.2.weight", "head.weight"]


def test_the_default_is_the_weights_of_linear_layers_and_convolutions():
    layers = {
        "linear": nn.Linear(2, 2), "c1": nn.Conv1d(2, 2, 1), "c2": nn.Conv2d(2, 2, 1), "c3": nn.Conv3d(2, 2, 1),
        "t1": nn.ConvTranspose1d(2, 2, 1), "t2": nn.ConvTranspose2d(2, 2, 1), "t3": nn.ConvTranspose3d(2, 2, 1),
        "norm": nn.BatchNorm2d(2), "layer_norm": nn.LayerNorm(2), "embedding": nn.Embedding(3, 2),
        "bag": nn.EmbeddingBag(3, 2), "lstm": nn.LSTM(2, 2), "prelu": nn.PReLU(),
    }  # fmt: skip
    chosen = select(nn.ModuleDict(layers))
    assert list(chosen) == [f"{name}.weight" for name in ("linear", "c1", "c2", "c3", "t1", "t2", "t3")]
    assert chosen["c2.weight"] is layers["c2"].weight


def test_a_module_that_is_one_layer_has_a_target_without_a_path():
    assert list(select(nn.Linear(2, 2))) == ["weight"]
    assert list(select(nn.Linear(2, 2), exclude=["bias"])) == ["weight"]


def test_transformers_conv1d_is_a_linear_layer():
    conv1d = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})()
    conv1d.weight = nn.Parameter(torch.ones(2, 3))
    other = type("Conv1D", (nn.Module,), {"__module__": "elsewhere"})()
    other.weight = nn.Parameter(torch.ones(2, 3))
    assert list(select(nn.ModuleDict({"ours": conv1d, "other": other}))) == ["ours.weight"]


def test_frozen_parameters_are_targets_too():
    assert list(select(Net().requires_grad_(False))) == DEFAULT


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("encoder", DEFAULT[:2]),
        (["encoder"], DEFAULT[:2]),
        (["encoder.0"], DEFAULT[:1]),
        (["encoder.0.weight"], DEFAULT[:1]),
        (["encoder.*"], DEFAULT[:2]),
        (["*.weight"], DEFAULT),
        (["*"], DEFAULT),
        (["encoder.[02]"], DEFAULT[:2]),
        (["h?ad"], DEFAULT[2:]),
        (("head", "encoder.2"), DEFAULT[1:]),
        (["embedding.weight"], ["embedding.weight"]),
        (["head", "head.bias"], ["head.weight", "head.bias"]),
        (["encoder._orig_mod.0"], DEFAULT[:1]),
    ],
)
def test_include_chooses_by_parameter_module_or_wildcard(include, expected):
    assert list(select(Net(), include)) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("head", DEFAULT[:2]),
        (["head.weight"], DEFAULT[:2]),
        (["encoder.0", "head"], DEFAULT[1:2]),
        (["*.0*"], DEFAULT[1:]),
        (["norm"], DEFAULT),
    ],
)
def test_exclude_takes_away_last(exclude, expected):
    assert list(select(Net(), exclude=exclude)) == expected
    assert list(select(Net(), ["*"], exclude)) == expected


def test_a_pattern_does_not_match_part_of_a_name():
    with pytest.raises(ValueError, match="'enc' matches no prunable tensor"):
        select(Net(), ["enc"])
    with pytest.raises(ValueError, match="'Encoder' matches no prunable tensor"):
        select(Net(), ["Encoder"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_the_names_seen(argument):
    with pytest.raises(ValueError, match=f"`{argument}` pattern 'decoder' .* seen: {', '.join(DEFAULT)}"):
        select(Net(), **{argument: ["head", "decoder"]})


def test_a_wildcard_does_not_reach_biases_and_norms():
    with pytest.raises(ValueError, match="'norm' matches no prunable tensor"):
        select(Net(), ["norm"])


def test_nothing_left_is_an_error_with_the_names_seen():
    with pytest.raises(ValueError, match=r"nothing to prune: .* leave no tensor\. Prunable tensors seen: encoder"):
        select(Net(), exclude=["*"])
    with pytest.raises(ValueError, match="nothing to prune"):
        select(Net(), include=[])


def test_a_module_without_layers_says_so():
    with pytest.raises(ValueError, match=r"seen: none \(no Linear or convolution\)"):
        select(nn.Embedding(3, 2))


def test_a_long_list_of_names_is_cut():
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight, .*, 39\.weight and 5 more\.") as caught:
        select(nn.Sequential(*[nn.Linear(1, 1) for _ in range(45)]), ["none"])
    assert "40.weight" not in str(caught.value)


def test_a_tied_tensor_is_one_target_under_its_first_name_and_answers_to_both():
    net = Net()
    net.decoder = nn.Linear(4, 4)
    net.decoder.weight = net.encoder[0].weight
    assert list(select(net)) == DEFAULT
    assert list(select(net, ["decoder"])) == ["encoder.0.weight"]
    assert list(select(net, exclude=["decoder.weight"])) == DEFAULT[1:]
    assert aliases(net)["decoder.weight"] == "encoder.0.weight"
    assert "decoder.weight" not in named_tensors(net)


def test_a_layer_that_is_used_twice_is_one_target():
    layer = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": layer, "b": layer})
    assert list(select(net)) == ["a.weight"]
    assert list(select(net, ["b"])) == ["a.weight"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_an_output_layer_tied_to_an_embedding_is_left_out_unless_named(embedding_first):
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    parts = {"embedding": embedding, "head": head} if embedding_first else {"head": head, "embedding": embedding}
    net = nn.ModuleDict({**parts, "body": nn.Linear(4, 4)})
    first = next(iter(parts))
    assert list(select(net)) == ["body.weight"]
    assert list(select(net, ["head.weight"])) == [f"{first}.weight"]
    with pytest.raises(ValueError, match="matches no prunable tensor"):
        select(net, ["head"])


def test_names_of_compiled_modules_are_those_of_the_plain_ones():
    net = Net()
    net.encoder = torch.compile(net.encoder, backend="eager")
    assert "encoder._orig_mod.0.weight" in dict(net.named_parameters())
    assert list(select(net)) == DEFAULT
    assert list(select(torch.compile(net, backend="eager"), ["encoder.0"])) == DEFAULT[:1]


def test_a_compiled_alias_of_a_layer_is_the_same_target():
    net = Net()
    net.fast = torch.compile(net.head, backend="eager")
    assert list(select(net)) == DEFAULT
    assert list(select(net, ["fast"])) == ["head.weight"]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("_orig_mod.fc.weight", "fc.weight"),
        ("net._orig_mod.fc._orig_mod", "net.fc"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("fc.weight", "fc.weight"),
        ("_orig_mod", ""),
    ],
)
def test_only_whole_parts_of_compiled_names_are_removed(name, canonical):
    assert canonical_name(name) == canonical


def test_a_module_whose_name_ends_like_a_compiled_one_keeps_it():
    assert list(select(nn.ModuleDict({"my_orig_mod": nn.Linear(2, 2)}))) == ["my_orig_mod.weight"]


def refused(module: nn.Module, message: str) -> None:
    """`layer` is refused by default and by name; without it `other` is left, and so it is when `other` is named."""
    net = nn.ModuleDict({"layer": module, "other": nn.Linear(2, 2)})
    for include in (None, ["layer"], ["*"]):
        with pytest.raises(ValueError, match=rf"'layer\.weight' .*{message}"):
            select(net, include)
    assert list(select(net, ["other"])) == ["other.weight"]
    assert list(select(net, exclude=["layer"])) == ["other.weight"]


def test_lazy_layers_are_refused_until_their_first_forward():
    lazy = nn.LazyLinear(2)
    refused(lazy, r"is lazy and has no shape yet\. Run one forward pass")
    lazy(torch.ones(1, 3))
    assert list(select(lazy)) == ["weight"]


def test_parametrized_weights_are_refused():
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Double())
    refused(layer, r"it is parametrized\. Call .*remove_parametrizations")


def test_a_parametrized_bias_is_no_obstacle():
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "bias", Double())
    assert list(select(layer)) == ["weight"]


def test_weight_norm_of_the_new_kind_is_refused():
    refused(parametrizations.weight_norm(nn.Linear(2, 2)), "it is parametrized")


def test_weight_norm_of_the_old_kind_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        layer = weight_norm(nn.Linear(2, 2))
    refused(layer, r"it is weight-normed .* Call torch\.nn\.utils\.remove_weight_norm")


def test_spectral_norm_of_both_kinds_is_refused():
    refused(parametrizations.spectral_norm(nn.Linear(2, 2)), "it is parametrized")
    refused(spectral_norm(nn.Conv2d(2, 2, 1)), "a spectral norm")


def test_masks_of_torch_prune_are_refused_until_they_are_made_permanent():
    layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
    refused(layer, r"it carries masks of torch\.nn\.utils\.prune")
    prune.remove(layer, "weight")
    assert list(select(layer)) == ["weight"]


@pytest.mark.parametrize("make", ["parametrize", "weight_norm", "prune"])
def test_the_parts_of_a_computed_weight_are_refused_by_name(make):
    layer = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if make == "parametrize":
            parametrize.register_parametrization(layer, "weight", Double())
        elif make == "weight_norm":
            weight_norm(layer)
        else:
            prune.identity(layer, "weight")
    net = nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)})
    parts = [name for name in named_tensors(net) if name.startswith("layer.") and name != "layer.bias"]
    assert parts
    for part in parts:
        with pytest.raises(ValueError, match=r"another tensor is computed from it"):
            select(net, [part])


def test_a_parameter_that_only_looks_like_a_part_is_a_target():
    layer = nn.Linear(2, 2)
    layer.scale_g = nn.Parameter(torch.ones(2))
    assert list(select(layer, ["scale_g"])) == ["scale_g"]


def test_quantized_layers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        layer = torch.ao.nn.quantized.dynamic.Linear(2, 2)
    refused(layer, "it is quantized")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_no_plain_floats_are_refused(dtype):
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    refused(layer, f"of dtype {dtype}; only plain tensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_16_32_and_64_bits_are_targets(dtype):
    assert list(select(nn.Linear(2, 2).to(dtype))) == ["weight"]


def test_packed_tensor_subclasses_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    refused(layer, "is a .* of dtype torch.float32; only plain tensors")


def test_meta_tensors_are_refused():
    refused(nn.Linear(2, 2, device="meta"), "is on the meta device")


def test_empty_tensors_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of initializing nothing
        layer = nn.Linear(0, 2)
    refused(layer, "has no entries")


@pytest.mark.parametrize("patterns", [5, [1], [""], "", ["fc", None], [["fc"]]])
def test_patterns_that_are_no_names_are_refused(patterns):
    with pytest.raises(ValueError, match="`include` must hold names or patterns"):
        check_patterns("include", patterns)


def test_one_string_is_one_pattern():
    assert check_patterns("include", "encoder") == ("encoder",)
    assert check_patterns("include", ["a", "b"]) == ("a", "b")
    assert check_patterns("include", None) is None
    assert check_patterns("exclude", ()) == ()


def test_pick_follows_the_order_of_the_names():
    tensors = {"a": torch.ones(1), "b": torch.ones(2)}
    assert list(pick(tensors, ["b", "a"])) == ["b", "a"]
