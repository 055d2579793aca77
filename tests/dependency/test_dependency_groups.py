"""Groups of small networks, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dependency_nets import NETS, Net, attention, conv, images, pooled, vectors, width_from_input
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.dependency import LabelledTensor, channel_groups, rule


def described(groups: Any) -> list[tuple[int, dict[str, int]]]:
    """Groups as (units, positions per unit), in any order of the tensors."""
    return [(len(g), {f"{n}.{d}": p.shape[1] for (n, d), p in g.slices.items()}) for g in groups]


@pytest.mark.parametrize("name", NETS)
def test_groups_are_those_known_by_hand(name):
    factory, example, expected = NETS[name]
    groups = channel_groups(factory(), example())
    assert {_frozen(item) for item in described(groups)} == {_frozen(item) for item in expected}
    assert groups.report.faults == ()


def _frozen(item: tuple[int, dict[str, int]]) -> tuple[int, frozenset[tuple[str, int]]]:
    return item[0], frozenset(item[1].items())


def test_residual_groups_know_their_makers_and_readers():
    factory, example, _ = NETS["residual"]
    first, second = channel_groups(factory(), example())
    assert first.name == "a"
    assert first.producers == {("a.weight", 0)}
    assert first.consumers == {("b.weight", 1), ("c.weight", 1)}
    assert second.producers == {("b.weight", 0), ("c.weight", 0)}
    assert second.consumers == {("f.weight", 1)}
    assert second.pass_throughs == {("b.bias", 0), ("c.bias", 0)}


def test_concatenated_sources_own_their_columns():
    factory, example, _ = NETS["concatenated"]
    first, second = channel_groups(factory(), example())
    assert first.slices["f.weight", 1].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert second.slices["f.weight", 1].ravel().tolist() == [6, 7, 8, 9]


def test_flattened_channels_own_consecutive_columns():
    factory, example, _ = NETS["flattened"]
    (group,) = channel_groups(factory(), example())
    assert np.array_equal(group.slices["f.weight", 1], np.arange(256).reshape(4, 64))


def test_heads_own_consecutive_rows_of_query_key_and_value():
    factory, example, _ = NETS["torch_attention"]
    (group,) = channel_groups(factory(), example())
    rows = group.slices["m.in_proj_weight", 0]
    assert rows[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]


def test_averaged_attention_weights_as_output_keep_all_heads():
    net = Net(lambda net, x: net.m(x, x, x), m=nn.MultiheadAttention(16, 4, batch_first=True))
    assert len(channel_groups(net, (torch.randn(2, 5, 16),))) == 0


def test_shortcut_padding_keeps_positions_between_two_groups_whole():
    factory, example, _ = NETS["padded_shortcut"]
    group = channel_groups(factory(), example()).named("a")
    assert group.slices["c.weight", 0].ravel().tolist() == [2, 3, 4, 5]


def test_reasons_are_given_in_words():
    factory, example, _ = NETS["norm_on_hidden"]
    frozen = channel_groups(factory(), example()).report.frozen
    assert "layer norm" in frozen["a.weight", 0]
    assert "output of the module" in frozen["o.weight", 0]


def test_unknown_operator_freezes_what_it_touches():
    net = Net(lambda net, x: net.b(torch.cdist(net.a(x), net.a(x))), a=nn.Linear(6, 8), b=nn.Linear(4, 3))
    groups = channel_groups(net, vectors())
    assert len(groups) == 0
    assert groups.report.unknown == {"cdist": 1}
    assert "cdist has no rule" in groups.report.frozen["a.weight", 0]


def test_a_rule_of_the_user_opens_an_unknown_operator(monkeypatch):
    from lightning_prune._dependency import walk

    monkeypatch.setattr(walk, "RULES", dict(walk.RULES))
    net = Net(lambda net, x: net.b(torch.special.i0e(net.a(x)).cummax(0)[0]), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    del walk.RULES["cummax"]
    assert len(channel_groups(net, vectors())) == 0

    def cummax(walk: Any, tensor: LabelledTensor, dim: int) -> list[LabelledTensor]:
        walk.freeze(tensor.labels[dim])
        return [LabelledTensor(spec.shape, [None, tensor.labels[1]]) for spec in walk.spec]

    walk.RULES["cummax"] = cummax
    assert len(channel_groups(net, vectors())) == 1
    assert rule("my_kernel")(cummax) is cummax


def test_a_failing_rule_is_an_unknown_operator(monkeypatch):
    from lightning_prune._dependency import walk

    def wrong(*_: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setitem(walk.RULES, "relu", wrong)
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    groups = channel_groups(net, vectors())
    assert len(groups) == 0
    assert groups.report.faults == ("relu: RuntimeError: boom",)


def test_a_rule_of_another_shape_is_an_unknown_operator(monkeypatch):
    from lightning_prune._dependency import walk

    monkeypatch.setitem(walk.RULES, "relu", lambda *_: LabelledTensor((1, 2)))
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    groups = channel_groups(net, vectors())
    assert len(groups) == 0
    assert "another shape" in groups.report.faults[0]


class DictBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        out = self.b(self.a(batch["x"]).relu())
        return {"loss": F.mse_loss(out, batch["pair"][0]), "pred": out}


def test_dict_batch_with_nested_tuple():
    batch = {"x": torch.randn(4, 6), "pair": (torch.randn(4, 3), 1)}
    (group,) = channel_groups(DictBatch(), batch)
    assert len(group) == 8


def test_named_arguments_go_to_forward_by_name():
    net = Named()
    (group,) = channel_groups(net, {"x": torch.randn(4, 6), "scale": None})
    assert len(group) == 8
    (group,) = channel_groups(net, torch.randn(4, 6), example_kwargs={"scale": torch.ones(())})
    assert len(group) == 8


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.b(self.a(x).relu())
        return out if scale is None else out * scale


def test_frozen_parameters_leave_like_others():
    net = Named()
    net.a.requires_grad_(False)
    (group,) = channel_groups(net, vectors())
    assert ("a.weight", 0) in group.slices


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)).relu())


class Forwarding(LightningModule):
    """Calls itself in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()
        self.loss = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, (y, _) = batch
        loss = self.loss(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Calling(Forwarding):
    """Calls its network in its step, never itself."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch["x"]), batch["y"])


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (Forwarding, (torch.zeros(4, 6), (torch.zeros(4, 3), 0))),
        (Calling, {"x": torch.zeros(4, 6), "y": torch.zeros(4, 3)}),
    ],
)
def test_lightning_module_with_a_batch_gives_the_groups_of_its_network(module, batch):
    plain = channel_groups(Plain(), vectors())
    groups = channel_groups(module(), batch)
    expected = [(units, {f"net.{name}": count for name, count in slices.items()}) for units, slices in described(plain)]
    assert described(groups) == expected


def test_lightning_module_with_the_arguments_of_forward_gives_the_groups_of_its_network():
    assert len(channel_groups(Forwarding(), torch.randn(4, 6))) == 1


class Branching(nn.Module):
    """Takes one of two ways by its data; `shared` makes both ways read the same weights."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        if self.shared:
            out = self.b(hidden) + self.c(hidden)
            return out * 2 if x.sum() > 0 else out
        return self.b(hidden) if x.sum() > 0 else self.c(hidden)


def test_a_branch_on_data_with_unread_parameters_offers_no_group():
    groups = channel_groups(Branching(shared=False), vectors())
    assert len(groups) == 0
    assert any("does not read every trainable parameter" in note for note in groups.report.notes)
    assert groups.report.unread in {("b.bias", "b.weight"), ("c.bias", "c.weight")}


def test_a_branch_on_data_that_reads_the_same_weights_is_analysed():
    (group,) = channel_groups(Branching(shared=True), vectors())
    assert len(group) == 8


def test_unread_parameters_are_reported_after_a_plain_export():
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(2, 2))
    groups = channel_groups(net, vectors())
    assert groups.report.unread == ("c.bias", "c.weight")
    assert len(groups) == 1


class TwoHeads(nn.Module):
    """An auxiliary head that only training runs, reading channels by number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = conv(3, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        features = pooled(self.a(x))
        return (self.b(features), self.aux(features)) if self.training else self.b(features)


def test_train_mode_adds_its_constraints():
    assert len(channel_groups(TwoHeads(), images())) == 0


def test_excluded_modules_keep_their_channels():
    factory, example, _ = NETS["residual"]
    assert [g.name for g in channel_groups(factory(), example(), exclude=["f"])] == ["a"]
    with pytest.raises(ValueError, match="`exclude` pattern 'nothing' matches no parameter"):
        channel_groups(factory(), example(), exclude=["nothing"])


def test_more_examples_add_their_constraints():
    net = Optional()
    assert len(channel_groups(net, vectors())) == 1
    assert len(channel_groups(net, vectors(), extra_inputs=[(torch.randn(4, 6), torch.randn(4, 8))])) == 0


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden if extra is None else hidden + extra)


def test_the_module_is_left_alone():
    module = Plain()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    channel_groups(module, vectors()[0])
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_global_random_state_is_left_alone():
    example, module = vectors(), Plain()
    state = torch.get_rng_state()
    channel_groups(module, example)
    assert torch.equal(torch.get_rng_state(), state)


def test_example_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"`example_input` must be accepted by Plain.forward, got \(float32\[4, 5\]\)"):
        channel_groups(Plain(), torch.randn(4, 5))


def test_something_else_than_a_module_is_refused():
    with pytest.raises(ValueError, match=r"`module` must be a torch\.nn\.Module, got int"):
        channel_groups(3, torch.randn(4, 5))  # type: ignore[arg-type]


def test_lazy_module_is_refused():
    with pytest.raises(ValueError, match="must have shapes, got the lazy parameter 'weight'"):
        channel_groups(nn.LazyLinear(3), torch.randn(4, 5))


def test_unknown_group_name_is_refused():
    factory, example, _ = NETS["residual"]
    with pytest.raises(ValueError, match=r"`name` must be one of the groups \(a, b\), got 'z'"):
        channel_groups(factory(), example()).named("z")


class Untraceable(nn.Module):
    """No way of tracing survives a forward that looks at fake tensors and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor or torch._guards.detect_fake_mode() or torch.fx._symbolic_trace.is_fx_tracing():
            raise RuntimeError("no tracing here")
        if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            raise RuntimeError("no tracing here")
        if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
            raise RuntimeError("no tracing here")
        return self.a(x)


def test_untraceable_module_keeps_the_reason_of_torch():
    with pytest.raises(ValueError, match=r"must be traceable, got Untraceable.*export: .*no tracing here") as caught:
        channel_groups(Untraceable(), vectors())
    assert "make_fx" in str(caught.value)
    assert "Nothing was changed" in str(caught.value)


def test_static_heads_are_found_in_a_width_from_input():
    (group,) = channel_groups(width_from_input(), (torch.randn(2, 5, 16),))
    assert group.slices["qkv.weight", 0][1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]


def test_grouped_queries_keep_their_query_heads_together():
    (group,) = channel_groups(attention(4, 2), (torch.randn(2, 5, 16),))
    assert group.slices["q.weight", 0].tolist() == [list(range(8)), list(range(8, 16))]
    assert group.slices["k.weight", 0].tolist() == [list(range(4)), list(range(4, 8))]


def test_a_module_that_holds_a_result_with_its_graph_is_traced() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    module.last = module(torch.randn(3, 4)).sum()  # as a metric keeps its value after a training step
    groups = channel_groups(module, torch.randn(2, 4))
    assert [len(group) for group in groups] == [6]
    assert module.last.grad_fn is not None
