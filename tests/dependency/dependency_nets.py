"""Small networks with known groups; each entry of NETS is (factory, example arguments, expected groups)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Expected = list[tuple[int, dict[str, int]]]  # per group: units, and positions per unit in each "tensor.dim"


class Net(nn.Module):
    """A module from named sub-modules and a forward function."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def pooled(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


def vectors() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 16),)


def residual() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.f(pooled(net.b(x).relu() + net.c(x)))

    return Net(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), f=nn.Linear(8, 5))


def concatenated() -> nn.Module:
    return Net(
        lambda net, x: net.f(pooled(torch.cat([net.a(x), net.b(x)], 1))),
        a=conv(3, 6), b=conv(3, 4), f=nn.Linear(10, 5),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return Net(lambda net, x: net.c(net.d(net.a(x))), a=conv(3, 8), d=conv(8, 16, groups=8), c=conv(16, 2))


def grouped() -> nn.Module:
    return Net(lambda net, x: net.c(net.g(net.a(x)).relu()), a=conv(3, 8), g=conv(8, 12, groups=4), c=conv(12, 2))


def flattened() -> nn.Module:
    return Net(lambda net, x: net.f(net.a(x).relu().flatten(1)), a=conv(3, 4), f=nn.Linear(256, 5))


def gated() -> nn.Module:
    return Net(lambda net, x: net.b(F.glu(net.a(x))), a=nn.Linear(6, 16), b=nn.Linear(8, 3))


def swiglu() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        gate, value = net.a(x).chunk(2, -1)
        return net.b(F.silu(gate) * value)

    return Net(run, a=nn.Linear(6, 16), b=nn.Linear(8, 3))


def squeeze_excite() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(x * net.v(net.u(pooled(x)).relu()).sigmoid()[:, :, None, None])

    return Net(run, a=conv(3, 8), u=nn.Linear(8, 4), v=nn.Linear(4, 8), c=conv(8, 2))


def pixel_shuffle() -> nn.Module:
    return Net(lambda net, x: net.b(F.pixel_shuffle(net.a(x), 2)), a=conv(3, 16), b=conv(4, 2))


def transposed() -> nn.Module:
    return Net(lambda net, x: net.b(net.t(net.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 6, 2, 2), b=conv(6, 2))


def group_norm() -> nn.Module:
    return Net(lambda net, x: net.b(net.n(net.a(x)).relu()), a=conv(3, 8), n=nn.GroupNorm(4, 8), b=conv(8, 2))


def batch_norm() -> nn.Module:
    return Net(lambda net, x: net.b(net.n(net.a(x)).relu()), a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 2))


def attention(heads: int, key_heads: int) -> nn.Module:
    """Heads of width 4; the numbers of heads are attributes."""

    def run(net: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = net.q(x).view(batch, length, net.num_heads, 4).transpose(1, 2)
        k = net.k(x).view(batch, length, net.num_key_heads, 4).transpose(1, 2)
        v = net.v(x).view(batch, length, net.num_key_heads, 4).transpose(1, 2)
        if net.num_key_heads != net.num_heads:
            k, v = (t.repeat_interleave(net.num_heads // net.num_key_heads, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return net.o(mixed.transpose(1, 2).reshape(batch, length, -1))

    net = Net(
        run, q=nn.Linear(16, 4 * heads), k=nn.Linear(16, 4 * key_heads), v=nn.Linear(16, 4 * key_heads),
        o=nn.Linear(4 * heads, 16),
    )  # fmt: skip
    net.num_heads, net.num_key_heads = heads, key_heads
    return net


def width_from_input(dropout: float = 0.0) -> nn.Module:
    """Reshapes by the width of its input, so that no attribute can make it smaller."""

    def run(net: Any, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = net.qkv(x).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return F.dropout(net.o(mixed.transpose(1, 2).reshape(batch, length, width)), net.dropout, net.training)

    net = Net(run, qkv=nn.Linear(16, 48), o=nn.Linear(16, 16))
    net.dropout = dropout
    return net


def torch_attention() -> nn.Module:
    return Net(lambda net, x: net.m(x, x, x)[0], m=nn.MultiheadAttention(16, 4, batch_first=True))


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(11, 8)
        self.h, self.o = nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.e.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.e(tokens)
        return self.out(x + self.o(self.h(x).relu()))


def reused() -> nn.Module:
    return Net(
        lambda net, x: net.o(net.h(net.h(net.i(x)).relu())),
        i=nn.Linear(6, 8), h=nn.Linear(8, 8), o=nn.Linear(8, 3),
    )  # fmt: skip


def norm_on_stream() -> nn.Module:
    return Net(
        lambda net, x: net.o(net.n(x + net.b(net.a(x)).relu())),
        a=nn.Linear(6, 8), b=nn.Linear(8, 6), n=nn.LayerNorm(6), o=nn.Linear(6, 3),
    )  # fmt: skip


def norm_on_hidden() -> nn.Module:
    return Net(lambda net, x: net.o(net.n(net.a(x))), a=nn.Linear(6, 8), n=nn.LayerNorm(8), o=nn.Linear(8, 3))


def softmax_on_hidden() -> nn.Module:
    return Net(lambda net, x: net.b(net.a(x).softmax(-1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


def one_position_read() -> nn.Module:
    return Net(lambda net, x: net.b(net.a(x)) + net.a(x)[:, 3:4], a=nn.Linear(6, 8), b=nn.Linear(8, 4))


def position_added() -> nn.Module:
    """Adds 0, 1, 2, ... to the channels: after a cut other channels would get these numbers."""
    return Net(lambda net, x: net.b(net.a(x) + torch.arange(8.0)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


def padded_shortcut() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.f(pooled(net.c(net.b(x)).relu() + F.pad(x, (0, 0, 0, 0, 2, 2))))

    return Net(run, a=conv(3, 4), b=conv(4, 6), c=conv(6, 8), f=nn.Linear(8, 3))


def recurrent() -> nn.Module:
    return Net(
        lambda net, x: net.o(net.g(x)[0][:, -1]),
        g=nn.GRU(16, 8, 2, batch_first=True, bidirectional=True), o=nn.Linear(16, 3),
    )  # fmt: skip


def stepped(cell: type[nn.RNNCellBase]) -> Callable[[], nn.Module]:
    """A cell run step by step over a sequence, its states carried along by hand."""

    def run(net: Any, x: Tensor) -> Tensor:
        states = None
        for step in range(x.shape[1]):
            states = net.c(x[:, step], states)
        return net.o(states[0] if isinstance(states, tuple) else states)

    return lambda: Net(run, c=cell(16, 8), o=nn.Linear(8, 3))


def _cell_tensors(gates: int) -> dict[str, int]:
    rows = {f"c.{kind}_{which}.0": gates for kind in ("weight", "bias") for which in ("ih", "hh")}
    return {**rows, "c.weight_hh.1": 1, "o.weight.1": 1}


class _Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))


def hand_contraction() -> nn.Module:
    return Net(
        lambda net, x: net.o((net.a(x)[:, :, None] * net.p.w).sum(1)),
        a=nn.Linear(6, 8), p=_Weight(8, 5), o=nn.Linear(5, 2),
    )  # fmt: skip


def layer(name: str, positions: int = 1) -> dict[str, int]:
    """Weight rows and bias of a module, `positions` per unit."""
    return {f"{name}.weight.0": positions, f"{name}.bias.0": positions}


_GRU_TENSORS = {
    f"g.{kind}_{which}_l{number}{direction}.0": 3
    for kind in ("weight", "bias") for which in ("ih", "hh") for number in (0, 1) for direction in ("", "_reverse")
}  # fmt: skip
_GRU_TENSORS.update({f"g.weight_hh_l{number}{direction}.1": 1 for number in (0, 1) for direction in ("", "_reverse")})
_GRU_TENSORS.update({"g.weight_ih_l1.1": 2, "g.weight_ih_l1_reverse.1": 2, "o.weight.1": 2})

NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], Expected]] = {
    "residual": (residual, images, [
        (8, {**layer("a"), "b.weight.1": 1, "c.weight.1": 1}),
        (8, {**layer("b"), **layer("c"), "f.weight.1": 1}),
    ]),
    "concatenated": (concatenated, images, [
        (6, {**layer("a"), "f.weight.1": 1}), (4, {**layer("b"), "f.weight.1": 1}),
    ]),
    "depthwise": (depthwise, images, [(8, {**layer("a"), **layer("d", 2), "c.weight.1": 2})]),
    "grouped": (grouped, images, [
        (2, {**layer("a", 4), "g.weight.1": 1}), (3, {**layer("g", 4), "c.weight.1": 4}),
    ]),
    "flattened": (flattened, images, [(4, {**layer("a"), "f.weight.1": 64})]),
    "gated": (gated, vectors, [(8, {**layer("a", 2), "b.weight.1": 1})]),
    "swiglu": (swiglu, vectors, [(8, {**layer("a", 2), "b.weight.1": 1})]),
    "squeeze_excite": (squeeze_excite, images, [
        (8, {**layer("a"), "u.weight.1": 1, **layer("v"), "c.weight.1": 1}), (4, {**layer("u"), "v.weight.1": 1}),
    ]),
    "pixel_shuffle": (pixel_shuffle, images, [(4, {**layer("a", 4), "b.weight.1": 1})]),
    "transposed": (transposed, images, [
        (8, {**layer("a"), "t.weight.0": 1}), (6, {"t.weight.1": 1, "t.bias.0": 1, "b.weight.1": 1}),
    ]),
    "group_norm": (group_norm, images, [(4, {**layer("a", 2), **layer("n", 2), "b.weight.1": 2})]),
    "batch_norm": (batch_norm, images, [
        (8, {**layer("a"), **layer("n"), "n.running_mean.0": 1, "n.running_var.0": 1, "b.weight.1": 1}),
    ]),
    "heads": (lambda: attention(4, 4), sequences, [
        (4, {**layer("q", 4), **layer("k", 4), **layer("v", 4), "o.weight.1": 4}),
    ]),
    "grouped_queries": (lambda: attention(4, 2), sequences, [
        (2, {**layer("q", 8), **layer("k", 4), **layer("v", 4), "o.weight.1": 8}),
    ]),
    "width_from_input": (width_from_input, sequences, [(4, {**layer("qkv", 12), "o.weight.1": 4})]),
    "torch_attention": (torch_attention, sequences, [
        (4, {"m.in_proj_weight.0": 12, "m.in_proj_bias.0": 12, "m.out_proj.weight.1": 4}),
    ]),
    "tied": (Tied, lambda: (torch.randint(0, 11, (2, 5)),), [
        (8, {"e.weight.1": 1, "h.weight.1": 1, **layer("o")}), (12, {**layer("h"), "o.weight.1": 1}),
    ]),
    "reused": (reused, vectors, [(8, {**layer("i"), **layer("h"), "h.weight.1": 1, "o.weight.1": 1})]),
    "norm_on_stream": (norm_on_stream, vectors, [(8, {**layer("a"), "b.weight.1": 1})]),
    "norm_on_hidden": (norm_on_hidden, vectors, []),
    "softmax_on_hidden": (softmax_on_hidden, vectors, []),
    "one_position_read": (one_position_read, vectors, []),
    "position_added": (position_added, vectors, []),
    "padded_shortcut": (padded_shortcut, images, [
        (4, {**layer("a"), "b.weight.1": 1, **layer("c"), "f.weight.1": 1}), (6, {**layer("b"), "c.weight.1": 1}),
    ]),
    "recurrent": (recurrent, sequences, [(8, _GRU_TENSORS)]),
    "lstm_cell": (stepped(nn.LSTMCell), sequences, [(8, _cell_tensors(4))]),
    "gru_cell": (stepped(nn.GRUCell), sequences, [(8, _cell_tensors(3))]),
    "rnn_cell": (stepped(nn.RNNCell), sequences, [(8, _cell_tensors(1))]),
    "hand_contraction": (hand_contraction, vectors, [
        (8, {**layer("a"), "p.w.0": 1}), (5, {"p.w.1": 1, "o.weight.1": 1}),
    ]),
}  # fmt: skip
