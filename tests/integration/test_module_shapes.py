"""Every shape a module takes: tied, lazy, late built, compiled, frozen, weight-normed, taught, adversarial."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.contract import NAMES, Spec, read_spec
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    Watch,
    expected_kept,
    fit,
    kept_of,
    leaks,
    make_trainer,
    masks_of,
    same,
    toy,
    weights_of,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_prune import Magnitude, MaskManager

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.filterwarnings("ignore:SynFlow does not conserve flow"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile looks
]


def magnitude(at: Any = "start", **arguments: Any) -> Magnitude:
    return Magnitude(0.5, at=at, measure=False, **arguments)


@pytest.fixture(params=NAMES)
def spec(request: pytest.FixtureRequest) -> Spec:
    return read_spec(request.param)


class Tied(Toy):
    """Two layers share one weight."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu().flatten(1)
        return self.head(self.two(self.one(self.hidden(features)).relu()).relu())


def test_a_tied_weight_is_counted_and_masked_once() -> None:
    module, watch, callback = toy(kind=Tied), Watch(), magnitude(1)
    fit(module, callback, watch)
    assert set(masks_of(module)) == {"conv.weight", "hidden.weight", "head.weight", "one.weight"}
    assert callback.history[-1]["total"] == Toy.TOTAL + 144
    assert module.two.weight is module.one.weight
    assert watch.found == [] == leaks(module)
    assert callback.receipt.reached["params"]["dense"] == sum(p.numel() for p in module.parameters())


def test_a_tied_weight_answers_to_its_other_name() -> None:
    module = toy(kind=Tied)
    fit(module, magnitude(include=["two.weight"]))
    assert set(masks_of(module)) == {"one.weight"}
    MaskManager.of(module).set_masks({"two.weight": torch.zeros(12, 12, dtype=torch.bool)})
    assert not module.one.weight.any()


class Shared(Tied):
    """One layer object, and one norm with its buffers, are registered under two names."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.two, self.again = self.one, self.norm


@pytest.mark.parametrize("kind", [Tied, Shared])
def test_scoring_leaves_shared_parts_whole(spec: Spec, kind: type[Toy]) -> None:
    def tensors() -> list[tuple[str, int]]:
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        return [(name, id(tensor)) for name, tensor in named]

    module, watch, callback = toy(kind=kind), Watch(), spec.build()
    before = tensors()
    fit(module, callback, watch)
    assert tensors() == before
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    assert watch.found == [] == leaks(module)
    weights = {name: mask for name, mask in masks_of(module).items() if mask.dim() > 1}  # channels take vectors along
    assert sum(mask.numel() for mask in weights.values()) == Toy.TOTAL + 144


def test_a_head_tied_to_an_embedding_is_left_alone() -> None:
    class Language(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(7, 32), nn.Linear(32, 7)
            self.decoder.weight = self.embedding.weight

    module = toy(kind=Language)
    make_trainer(magnitude(), limit_train_batches=2, limit_val_batches=0).fit(module)
    assert set(masks_of(module)) == {"layer.weight"}


class LateBuilt(Toy):
    """Layers come into being in `configure_model`, after every callback's `setup`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head = None

    def configure_model(self) -> None:
        if self.head is None:
            self.head = nn.Linear(12, 3)


def test_a_module_built_in_configure_model_is_pruned_whole() -> None:
    module, watch = toy(kind=LateBuilt), Watch()
    for _ in range(2):
        fit(module, magnitude(), watch)
    assert sum(mask.numel() for mask in masks_of(module).values()) == Toy.TOTAL
    assert watch.found == [] == leaks(module)


class Lazy(Toy):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden = nn.LazyLinear(12)


def test_a_lazy_module_is_refused_before_its_first_use_and_pruned_after() -> None:
    module = toy(kind=Lazy)
    with pytest.raises(ValueError, match=r"'hidden.weight' is lazy.*Run one forward pass"):
        fit(module, magnitude())
    module = toy(kind=Lazy)
    module(torch.zeros(2, 1, 6, 6))
    fit(module, magnitude())
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2


def weight_normed(module: Any) -> None:
    nn.utils.parametrizations.weight_norm(module.hidden)


def old_weight_normed(module: Any) -> None:
    nn.utils.weight_norm(module.hidden)


def torch_pruned(module: Any) -> None:
    nn.utils.prune.l1_unstructured(module.hidden, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", [weight_normed, old_weight_normed, torch_pruned])
def test_hidden_weights_are_refused_with_the_way_out(change: Callable[[Any], None]) -> None:
    module = toy()
    change(module)
    before = weights_of(module)
    with pytest.raises(ValueError, match=r"'hidden.weight' cannot be pruned: .* leave it out with exclude=") as error:
        fit(module, magnitude())
    assert same(weights_of(module), before)
    (advised,) = re.findall(r"exclude=\['(.*)'\]", str(error.value))
    fit(module, magnitude(exclude=[advised]))
    assert kept_of(module, masks_of(module)) == 36


class CompiledInside(Toy):
    """A compiled layer: its parameters' names carry `_orig_mod`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden = torch.compile(self.hidden, backend="eager")


class CompilesItself(Toy):
    """`module.compile()` keeps all names."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden.compile(backend="eager")


@pytest.mark.parametrize("kind", [CompiledInside, CompilesItself])
def test_compiled_layers_train_as_eager_ones_do(spec: Spec, kind: type[Toy]) -> None:
    module, eager, watch = toy(kind=kind), toy(), Watch()
    fit(module, spec.build(), watch)
    fit(eager, spec.build())
    assert {"conv.weight", "hidden.weight", "head.weight"} <= set(masks_of(module))
    assert not spec.counts_weights or len(masks_of(module)) == 3
    assert same(masks_of(module), masks_of(eager))
    assert same(list(weights_of(module).values()), list(weights_of(eager).values()))
    assert watch.found == []


def test_a_compiled_lightning_module_shares_its_masks() -> None:
    class Silent(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    module = toy(kind=Silent)
    compiled = torch.compile(module, backend="eager")
    fit(compiled, magnitude(1))
    assert MaskManager.of(compiled) is MaskManager.of(module)
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2


def test_changing_masks_does_not_compile_again() -> None:
    torch._dynamo.reset()  # what other tests compiled counts towards the limit of recompilations
    counted = CompileCounter()
    layer = nn.Linear(6, 4)
    compiled = torch.compile(layer, backend=counted)
    for sparsity in (0.0, 0.5, 0.75):
        mask = (torch.arange(24) >= sparsity * 24).view(4, 6)
        MaskManager.of(layer).set_masks({"weight": mask})
        compiled(torch.ones(2, 6)).sum().backward()
    assert counted.frame_count == 1


class Frozen(Toy):
    """A part that needs no gradient."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden.requires_grad_(False)


def test_frozen_parts_are_pruned_by_name_and_type(spec: Spec) -> None:
    module = toy(kind=Frozen)
    fit(module, spec.build())
    assert "hidden.weight" in masks_of(module)
    assert leaks(module) == []


class Gan(LightningModule):
    """Two networks, two losses, two optimizers, a gradient penalty on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 36))
        self.critic = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        make, judge = self.optimizers()
        real = batch[0].flatten(1)
        noise = torch.randn(len(real), 4)
        for optimizer, sign in ((judge, 1), (make, -1)):
            loss = sign * (self.critic(self.generator(noise)) - self.critic(real)).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.generator.parameters()), torch.optim.RMSprop(self.critic.parameters())


def test_a_gan_is_pruned_in_the_part_that_is_asked_for() -> None:
    module, watch = toy(kind=Gan), Watch()
    fit(module, magnitude(1, include=["generator"]), watch)
    assert set(masks_of(module)) == {"generator.0.weight", "generator.2.weight"}
    assert kept_of(module, masks_of(module)) == expected_kept(64 + 576, 0.5)
    assert watch.steps == 2 * 2 * STEPS
    assert watch.found == [] == leaks(module)


class Taught(Toy):
    """A teacher inside the module follows its student by a moving average; no optimizer owns it."""

    def __init__(self, when: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.when = when
        self.teacher = copy.deepcopy(self.hidden).requires_grad_(False)

    def follow(self, when: str) -> None:
        if when == self.when:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.hidden.weight, 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.follow("on_train_batch_end")

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("when", ["training_step", "on_train_batch_end"])
def test_a_teacher_that_no_optimizer_owns_is_sparse_in_every_checkpoint(when: str, tmp_path: Path) -> None:
    module, callback = toy(kind=Taught, when=when), magnitude(1)
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(module, callback, saver, enable_checkpointing=True)
    assert leaks(module) == []
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    pruned = [checkpoint for checkpoint in saved if checkpoint["global_step"] > STEPS]
    assert len(pruned) == STEPS
    for checkpoint in pruned:
        masks = checkpoint["callbacks"][callback.state_key]["masks"]
        assert not masks["teacher.weight"].all()
        assert [name for name, mask in masks.items() if checkpoint["state_dict"][name][~mask].any()] == []


def test_a_module_without_prunable_layers_is_told_what_was_seen() -> None:
    class Bare(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LayerNorm(32)

    with pytest.raises(ValueError, match=r"nothing to prune.*none \(no Linear or convolution\)"):
        make_trainer(magnitude(), limit_val_batches=0).fit(Bare())


def test_weights_far_apart_in_size_are_ranked_as_they_are() -> None:
    """No layer's scale is normalised away: the small layer gives all that is pruned."""
    module = toy()
    with torch.no_grad():
        module.hidden.weight.mul_(1e-6)
    fit(module, magnitude())
    assert {name: int(mask.sum()) for name, mask in masks_of(module).items()} == {
        "conv.weight": 36, "hidden.weight": 420 - 72, "head.weight": 36,
    }  # fmt: skip
