"""prune() without a Trainer: exact counts, the receipt's numbers, and nothing changed by a failure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import GradualMagnitude, Magnitude, MaskManager, PruningCallback, RandomPruning, prune
from lightning_prune.context import Context, Proposal
from lightning_prune.selection import keep_top, kept_count


class Gradients(PruningCallback):
    """A method that needs a loss: the largest |gradient| stay; `broken` spoils the proposal."""

    method = "gradients"

    def __init__(self, sparsity: float, broken: str = "", **common: Any) -> None:
        super().__init__(**common)
        self.sparsity, self.broken = sparsity, broken

    def due(self, position: Any) -> float | None:
        return None

    def propose(self, context: Context) -> Proposal:
        if self.broken == "raises":
            raise RuntimeError("half way")
        gradients = context.objective.gradients(list(context.weights))
        masks = keep_top({n: g.abs() for n, g in gradients.items()}, context.target, alive=context.alive)
        if self.broken == "shape":
            masks["head.weight"] = masks["head.weight"].t()
        values = (
            {n: torch.full_like(w, float("inf")) for n, w in context.weights.items()} if self.broken == "inf" else None
        )
        return Proposal(masks, values, notes=["scored"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def state_of(module: nn.Module) -> list[Any]:
    manager = MaskManager.of(module)
    return copy.deepcopy(
        [module.state_dict(), manager.masks, manager.version, [m.training for m in module.modules()],
         {n: p.grad for n, p in module.named_parameters()}, torch.get_rng_state()]
    )  # fmt: skip


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, (list, dict)):
        assert len(one) == len(two)
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], two[key])
    else:
        assert one == two


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("method", [Magnitude, RandomPruning, GradualMagnitude])
def test_the_count_is_exact(method, sparsity):
    module = net()
    receipt = prune(module, method(sparsity=sparsity, **({} if method is Magnitude else {"scope": "global"})))
    kept = kept_count(72, sparsity)
    assert MaskManager.of(module).counts() == (kept, 72)
    assert int((module[0].weight != 0).sum() + (module[2].weight != 0).sum()) == kept
    assert receipt.reached["kept"] == kept
    assert receipt.reached["total"] == 72
    assert receipt.reached["sparsity"] == MaskManager.of(module).sparsity() == (72 - kept) / 72
    assert receipt.requested["sparsity"] == sparsity


def test_the_receipt_states_what_was_asked_and_got():
    module = net()
    receipt = prune(module, Magnitude(sparsity=0.5, seed=3))
    assert receipt.method == "magnitude"
    assert receipt.seed == 3
    assert receipt.arguments["sparsity"] == 0.5
    assert receipt.arguments["at"] == "start"
    assert receipt.reached["params"] == {"dense": 83, "pruned": 47}
    assert [(layer["name"], layer["shape"], layer["total"]) for layer in receipt.layers] == [
        ("0.weight", [8, 6], 48),
        ("2.weight", [3, 8], 24),
    ]
    assert sum(layer["kept"] for layer in receipt.layers) == 36
    assert receipt.reached["flops"] is None


def test_a_method_of_ones_own_states_the_arguments_it_inherits():
    class Loud(Magnitude):
        def __init__(self, volume: int = 11, **common: Any) -> None:
            super().__init__(**common)
            self.volume = volume

    arguments = prune(net(), Loud(sparsity=0.5)).arguments
    assert (arguments["volume"], arguments["sparsity"], arguments["seed"]) == (11, 0.5, 0)


def test_an_example_input_gives_flops_and_leaves_the_module_as_it_was(tiny):
    """FLOPs of one image: 2 for each multiply-add of 4 x 9 x 16, 16 x 8 and 8 x 3."""
    before = copy.deepcopy(dict(tiny.named_buffers()))
    receipt = prune(tiny, Magnitude(sparsity=0.5), example_input=torch.randn(1, 1, 4, 4))
    assert receipt.reached["flops"]["dense"] == 2 * (4 * 9 * 16 + 16 * 8 + 8 * 3)
    assert receipt.milliseconds["dense"]["median"] > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in tiny.named_buffers())
    assert tiny.training
    assert tiny.head.weight.grad is None
    assert tiny.head.weight.requires_grad


def test_the_method_tells_what_it_did():
    method = Magnitude(sparsity=0.5)
    prune(net(), method)
    assert [event["kept"] for event in method.history] == [36]


def test_include_and_exclude_choose_what_is_counted():
    module = net()
    prune(module, Magnitude(sparsity=0.5, exclude=["2"]))
    assert MaskManager.of(module).counts() == (24, 48)
    assert (module[2].weight != 0).all()


def test_pruning_again_counts_what_is_gone():
    module = net()
    prune(module, Magnitude(sparsity=0.5))
    first = MaskManager.of(module).masks
    prune(module, RandomPruning(sparsity=0.75, scope="global"))
    second = MaskManager.of(module).masks
    assert MaskManager.of(module).counts() == (18, 72)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)
    prune(module, Magnitude(sparsity=0.25))  # less than there is
    assert_same(MaskManager.of(module).masks, second)


def test_pairs_of_moments_end_at_the_last_sparsity():
    module = net()
    prune(module, Magnitude(at=[("start", 0.25), (3, 0.75)]))
    assert MaskManager.of(module).counts() == (18, 72)


def test_a_compiled_module_is_pruned_through(tiny):
    compiled = torch.compile(tiny, backend="eager")
    prune(compiled, Magnitude(sparsity=0.5))
    assert MaskManager.of(tiny).counts() == (94, 188)
    assert list(MaskManager.of(tiny).masks) == ["conv.weight", "hidden.weight", "head.weight"]


def test_masks_hold_in_a_training_loop_of_ones_own():
    module = net()
    prune(module, Magnitude(sparsity=0.9))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    MaskManager.of(module).attach([optimizer])
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 6)).pow(2).sum().backward()
        optimizer.step()
    MaskManager.of(module).detach()
    assert int((module[0].weight != 0).sum() + (module[2].weight != 0).sum()) == kept_count(72, 0.9)


# methods that need a loss


def expected_masks(module: nn.Module, batches: list[Any], sparsity: float) -> dict[str, Tensor]:
    twin = copy.deepcopy(module)
    sum(nn.functional.cross_entropy(twin(x), y) for x, y in batches).backward()
    names = ["conv.weight", "hidden.weight", "head.weight"]
    return keep_top({name: twin.get_parameter(name).grad.abs() for name in names}, sparsity)


def test_the_module_step_is_the_loss_of_a_lightning_module(tiny, dataset):
    tiny.norm.eval()  # one batch or several: the same statistics
    batches = list(DataLoader(dataset, batch_size=8))
    expected = expected_masks(tiny, batches, 0.5)
    before = state_of(tiny)
    receipt = prune(tiny, Gradients(0.5), DataLoader(dataset, batch_size=8))
    assert_same(MaskManager.of(tiny).masks, expected)
    assert "scored" in receipt.notes
    after = state_of(tiny)
    assert_same(after[3:], before[3:])
    assert_same({n: b for n, b in after[0].items() if "norm" in n}, {n: b for n, b in before[0].items() if "norm" in n})


@pytest.mark.parametrize("given", ["argument", "method"])
def test_a_plain_module_takes_a_loss_function_and_any_iterable(given, tiny, dataset):
    module = nn.ModuleDict({"head": nn.Linear(16, 3)})
    batches = [(x.flatten(1), y) for x, y in DataLoader(dataset, batch_size=12)]

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(m["head"](batch[0]), batch[1])

    if given == "argument":
        prune(module, Gradients(0.5), batches, loss_fn)
    else:
        prune(module, Gradients(0.5, loss_fn=loss_fn, calibration_dataloader=batches))
    assert MaskManager.of(module).counts() == (24, 48)


# refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: prune(m, "magnitude"), ValueError, r"`method` must be a pruning callback .*, got 'magnitude'"),
        (lambda m: prune(m, Magnitude), ValueError, "`method` must be a pruning callback"),
        (lambda m: prune(m, Magnitude(sparsity=0.5, include=["decoder"])), ValueError, "'decoder' matches no prunable"),
        (lambda m: prune(m, Magnitude(sparsity=0.5, exclude=["*"])), ValueError, "nothing to prune"),
        (lambda m: prune(m, Magnitude(sparsity=0.5, layer_floor=0.5, scope="layer", include="odd")), ValueError, "odd"),
        (lambda m: prune(m, Magnitude(pattern="5:7")), ValueError, "fits no selected tensor"),
        (lambda m: prune(m, Gradients(0.5)), ValueError, "gradients needs data. Give `dataloader`"),
        (lambda m: prune(m, Gradients(0.5), []), ValueError, "there is no calibration batch"),
        (lambda m: prune(m, Gradients(0.5, "raises"), []), RuntimeError, "half way"),
        (lambda m: prune(m, Gradients(0.5, "shape"), data()), ValueError, "It belongs to another model"),
        (lambda m: prune(m, Gradients(0.5, "inf"), data()), ValueError, "must be finite to be pruned"),
        (
            lambda m: prune(m, Gradients(0.5), [(data()[0][0] * float("nan"), data()[0][1])]),
            ValueError,
            "batch 0 is not",
        ),
    ],
)
def test_a_failure_changes_nothing(tiny, make, error, message):
    prune(tiny, Magnitude(sparsity=0.1))
    before = state_of(tiny)
    with pytest.raises(error, match=message):
        make(tiny)
    assert_same(state_of(tiny), before)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 1, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0]))]


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"`module` must be a torch\.nn\.Module, got dict"):
        prune({}, Magnitude(sparsity=0.5))


def test_a_module_without_a_step_needs_a_loss_function():
    with pytest.raises(ValueError, match="Sequential has no `training_step`"):
        prune(net(), Gradients(0.5), [torch.ones(1, 6)])
