"""CHITA end to end: what it gains over magnitude, what its rows are, when it prunes, what it reports and leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from methods.prospr_cases import QUIET, entropy, same, trainer_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_prune import CHITA, Magnitude, MaskManager, prune
from lightning_prune.methods import _chita_stages, chita
from lightning_prune.methods._chita_refit import RefitSettings
from lightning_prune.methods._chita_stages import StageSettings
from lightning_prune.methods.chita import prune_in_stages, unflatten
from lightning_prune.objective import Objective
from lightning_prune.sample_gradients import GradientSource, gradient_rows

pytestmark = QUIET
SMALL: dict[str, Any] = {
    "stages": 1, "num_grads": 8, "grad_batch": 2, "refits": 1, "refit_samples": 8, "measure": False
}  # fmt: skip


# oracles


class Moons:
    """Two arms that a small network tells apart, and one trained on them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        angle = 3.14159 * torch.rand(600, generator=generator)
        labels = torch.arange(600) % 2
        arms = torch.stack([angle.cos() + labels, angle.sin() * (1 - 2 * labels) + 0.3 * labels], 1)
        inputs = arms + 0.05 * torch.randn(600, 2, generator=generator)
        self.batches = [(inputs[i : i + 100], labels[i : i + 100]) for i in range(0, 600, 100)]
        self.whole = (inputs, labels)
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        for _ in range(120):
            optimizer.zero_grad()
            self.loss(self.net, self.whole).backward()
            optimizer.step()
        optimizer.zero_grad()

    @staticmethod
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    def after(self, method: Any) -> float:
        """The loss when a copy of the network is pruned."""
        net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
        net.load_state_dict(self.net.state_dict())
        prune(net, method, self.batches, self.loss)
        with torch.no_grad():
            return float(self.loss(net, self.whole))


def test_chita_loses_less_than_magnitude_and_eight_stages_no_more_than_one() -> None:
    totals = torch.zeros(3)
    for seed in range(4):
        task = Moons(seed)
        dense = float(task.loss(task.net, task.whole).detach())
        common: dict[str, Any] = {"num_grads": 150, "grad_batch": 4, "refits": 0, "measure": False}
        methods = [Magnitude(0.9, measure=False), CHITA(0.9, stages=1, **common), CHITA(0.9, stages=8, **common)]
        losses = torch.tensor([task.after(method) for method in methods])
        assert losses[2] < losses[0]
        assert losses[1] <= losses[0]  # where one stage cannot do better, it is magnitude pruning
        totals += losses - dense
    magnitude, one, eight = totals.tolist()
    assert one < magnitude
    assert eight <= one


def test_the_gradient_matrix_gives_the_hessian_where_labels_are_drawn_from_the_model() -> None:
    """Fisher's identity for softmax regression: A^T A / n -> mean of (diag(p) - p p^T) (x) (x x^T)."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4, bias=False).double()

    def error(count: int) -> float:
        inputs = torch.randn(count, 3, dtype=torch.float64)
        with torch.no_grad():
            chances = net(inputs).softmax(1)
        labels = chances.multinomial(1).squeeze(1)
        objective = Objective(
            net, lambda limit: [(inputs, labels)], lambda m, b: functional.cross_entropy(m(b[0]), b[1])
        )
        rows = gradient_rows(objective, ["weight"], count, 1, torch.float64)
        inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
        exact = torch.einsum("nij,nk,nl->ikjl", inner, inputs, inputs).reshape(12, 12) / count
        return float((rows.T @ rows / count - exact).norm() / exact.norm())

    few, many = error(500), error(32_000)
    assert many < 0.03
    assert many < few / 3  # 64 times the rows: an eighth of the error, on average


# what is proposed


def test_flat_vectors_take_the_shapes_and_types_of_the_weights() -> None:
    weights = {"a": torch.zeros(2, 2), "b": torch.zeros(3, dtype=torch.float16)}
    masks, values = unflatten(weights, torch.arange(7.0), torch.arange(7) > 2)
    assert masks["a"].tolist() == [[False, False], [False, True]]
    assert masks["b"].tolist() == [True, True, True]
    assert values["a"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert values["b"].dtype == torch.float16


@pytest.mark.parametrize("algorithm", ["bso", "iht", "block", "obs", "woodfisher"])
@pytest.mark.parametrize("stages", [1, 3])
def test_the_count_is_exact_for_every_algorithm(algorithm: str, stages: int, tiny: Any, loader: DataLoader) -> None:
    prune(tiny, CHITA(0.7, algorithm=algorithm, **{**SMALL, "stages": stages}), list(loader), entropy)
    assert MaskManager.of(tiny).counts() == (188 - 131, 188)  # floor(0.7 * 188) = 131
    mask = MaskManager.of(tiny).masks["hidden.weight"]
    assert not tiny.hidden.weight[~mask].any()


def test_nothing_is_read_or_moved_where_nothing_has_to_go(tiny: Any) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    prune(tiny, CHITA(0.0, **SMALL), None, entropy)
    assert same(dict(tiny.state_dict()), before)


def test_weights_of_an_earlier_event_stay_pruned(tiny: Any, loader: DataLoader) -> None:
    prune(tiny, Magnitude(0.5, measure=False))
    first = MaskManager.of(tiny).masks
    prune(tiny, CHITA(0.8, algorithm="iht", **{**SMALL, "stages": 3}), list(loader), entropy)
    second = MaskManager.of(tiny).masks
    assert all(bool((first[name] | ~second[name]).all()) for name in second)
    assert MaskManager.of(tiny).counts() == (38, 188)


@pytest.mark.parametrize(("metric", "norm", "used"), [(None, True, 0.0), (None, False, 0.5), (0.7, True, 0.7)])
def test_weights_keep_their_own_units_under_batch_norm(
    metric: float | None, norm: bool, used: float, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.Linear(8, 3))
    seen, honest = [], _chita_stages.run_stage

    def spy(*arguments: Any, **more: Any) -> Any:
        seen.append(arguments[5].metric)
        return honest(*arguments, **more)

    monkeypatch.setattr(_chita_stages, "run_stage", spy)
    prune(net, CHITA(0.5, metric=metric, **SMALL), list(loader), entropy)
    assert set(seen) == {used}


# when


@pytest.mark.parametrize(("rows", "samples", "held"), [(8, 2, 64), (24, 2, 96), (64, 16, 256), (500, 8, 256)])
def test_losses_are_compared_on_twice_what_the_rows_read_within_bounds(
    rows: int, samples: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = GradientSource.held_loss

    def noting(self: GradientSource, count: int, train_norms: bool = False) -> float:
        asked.append(count)
        return plain(self, count, train_norms)

    monkeypatch.setattr(GradientSource, "held_loss", noting)
    moons = Moons(0)
    settings = StageSettings((1e-3,), refit=RefitSettings(count=0))
    with GradientSource(Objective(moons.net, lambda count: iter(moons.batches), moons.loss), ["2.weight"]) as source:
        flat = moons.net[2].weight.detach().flatten()
        list(prune_in_stages(source, flat, torch.ones(576, dtype=torch.bool), [0.5], rows, samples, settings))
    assert set(asked) == {held}


def test_at_the_end_the_fit_is_as_without_pruning(tiny_class: Any, loader: DataLoader) -> None:
    torch.manual_seed(0)
    dense = tiny_class()
    pruned = tiny_class()
    pruned.load_state_dict(dense.state_dict())
    plain = DataLoader(loader.dataset, batch_size=4)
    trainer_of().fit(dense, plain)
    callback = CHITA(0.5, at="end", refit_bn=False, **{**SMALL, "refits": 0, "first_order": False, "ridge": 1e9})
    trainer_of(callback).fit(pruned, plain)
    mask = MaskManager.of(pruned).masks["hidden.weight"]
    # with a ridge that large nothing moves: what is kept is what training left
    assert torch.allclose(pruned.hidden.weight[mask], dense.hidden.weight[mask], rtol=0, atol=1e-6)
    assert callback.history[0]["step"] == len(plain)
    assert MaskManager.of(pruned).counts() == (94, 188)


def test_from_a_checkpoint_it_prunes_before_the_first_step(tiny_class: Any, loader: DataLoader, tmp_path: Any) -> None:
    trainer = trainer_of()
    trainer.fit(tiny_class(), loader)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    tuned = tiny_class()
    tuned.load_state_dict(torch.load(tmp_path / "dense.ckpt", weights_only=True)["state_dict"])
    callback = CHITA(0.5, **SMALL)
    trainer_of(callback).fit(tuned, loader)
    assert (callback.history[0]["step"], len(callback.history)) == (0, 1)
    assert not tuned.hidden.weight[~MaskManager.of(tuned).masks["hidden.weight"]].any()


# what is reported


def test_the_receipt_reports_stages_samples_and_batch_norm(tiny: Any, loader: DataLoader) -> None:
    receipt = prune(tiny, CHITA(0.5, refit_bn_batches=3, **{**SMALL, "stages": 2}), list(loader), entropy)
    assert receipt.repair == "BatchNorm statistics re-estimated on 3 batches"
    assert any(note.startswith("2 stage(s) of 8 gradient rows of 2 samples") for note in receipt.notes)
    assert receipt.certificate is None
    assert receipt.arguments["stages"] == 2
    assert receipt.method == "chita"


def test_a_stage_that_falls_back_to_magnitude_says_so(
    tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = _chita_stages.run_stage

    def spoiled(weights: Tensor, *arguments: Any, **more: Any) -> Any:
        stage = honest(weights, *arguments, **more)
        return replace(stage, weights=-100 * stage.weights, loss=1e9)

    monkeypatch.setattr(_chita_stages, "run_stage", spoiled)
    magnitude = torch.cat(
        [tiny.get_parameter(f"{name}.weight").detach().flatten() for name in ("conv", "hidden", "head")]
    )
    receipt = prune(tiny, CHITA(0.5, **{**SMALL, "refits": 0}), list(loader), entropy)
    assert any(note.startswith("1 stage(s) chose by magnitude") for note in receipt.notes)
    kept = torch.cat([MaskManager.of(tiny).masks[f"{name}.weight"].flatten() for name in ("conv", "hidden", "head")])
    assert float(magnitude[kept].abs().min()) >= float(magnitude[~kept].abs().max())


def test_a_fallback_is_refitted(loader: DataLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    start, honest = net[1].weight.detach().clone(), _chita_stages.run_stage

    def spoiled(*arguments: Any, **more: Any) -> Any:
        stage = honest(*arguments, **more)
        return replace(stage, weights=-100 * stage.weights, loss=1e9)

    monkeypatch.setattr(_chita_stages, "run_stage", spoiled)
    prune(net, CHITA(0.5, **{**SMALL, "refits": 8, "refit_samples": 24}), list(loader), entropy)
    mask = MaskManager.of(net).masks["1.weight"]
    assert not torch.equal(net[1].weight[mask], start[mask])


def test_without_batch_norm_or_on_request_nothing_is_repaired(tiny: Any, loader: DataLoader) -> None:
    before = tiny.norm.running_mean.clone()
    receipt = prune(tiny, CHITA(0.5, refit_bn=False, **SMALL), list(loader), entropy)
    assert receipt.repair is None
    assert torch.equal(tiny.norm.running_mean, before)


@pytest.mark.parametrize(("shown", "stages"), [(True, 3), (True, 1), (False, 3)])
def test_a_bar_shows_the_samples_read(
    shown: bool, stages: int, tiny: Any, loader: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    class Bar:
        def __init__(self, **settings: Any) -> None:
            drawn.append(self)
            self.done: list[int] = []

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def add_task(self, text: str, total: int) -> int:
            self.total = total
            return 0

        def update(self, task: int, completed: int) -> None:
            self.done.append(completed)

    monkeypatch.setattr(chita, "Progress", Bar)
    honest, objectives = CHITA.propose, []

    def proposing(self: CHITA, context: Any) -> Any:
        objectives.append((context.objective, context.objective.advance))
        return honest(self, replace(context, show_progress=shown))

    monkeypatch.setattr(CHITA, "propose", proposing)
    prune(tiny, CHITA(0.7, **{**SMALL, "stages": stages}), list(loader), entropy)
    assert len(drawn) == shown
    for bar in drawn:  # rows of 16 samples, and a refit of 8
        assert bar.total == stages * 16 + 8
        assert bar.done == sorted(bar.done)
        assert 16 < bar.done[-1] <= bar.total
        assert len(bar.done) > stages
    assert all(objective.advance is advance for objective, advance in objectives)
