"""`python examples/compare_model_pruning.py` : Lightning's ModelPruning and Magnitude on the same network.

Every line of the tables is measured in this run: the sparsity epoch by epoch, what a checkpoint holds,
what a resumed fit does with it, which tensors are chosen, and what a training step costs (CPU time as a
ratio to a dense step; variants take turns). `--no-cost` leaves the second table out, `--only-cost` the
first.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Magnitude, MaskManager
from lightning_prune.recipes.classifier import LitClassifier
from lightning_prune.recipes.data import Digits
from lightning_prune.recipes.networks import convnet, mlpnet, resnet20

EPOCHS, AMOUNT = 4, 0.5
Make = Callable[[LightningModule], Callback]


def small_convnet() -> nn.Module:
    """Return four convolutions with BatchNorm and a linear layer."""
    return convnet(width=8)


def classifier(network: Callable[[], nn.Module] = small_convnet) -> LitClassifier:
    """Return a fresh module, always with the same initial weights."""
    seed_everything(0, verbose=False)
    return LitClassifier(network(), partial(torch.optim.SGD, lr=0.05, momentum=0.9))


def digits() -> DataLoader:
    """Return batches of digits in a fixed order, so that two fits can be compared bit for bit."""
    data = Digits(subset=512)
    data.setup()
    return DataLoader(TensorDataset(*data.parts.train), batch_size=64)


def layers(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers and convolutions."""
    return [child for child in module.modules() if isinstance(child, (nn.Linear, nn.Conv2d))]


def sparsity(module: nn.Module) -> float:
    """Return the fraction of exact zeros in the weights that linear layers and convolutions compute with."""
    weights = [layer.weight for layer in layers(module)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def model_pruning(module: LightningModule, amount: float = AMOUNT, permanent: bool = True) -> ModelPruning:
    """Return Lightning's callback on the same tensors, without the reset of weights that is its default."""
    chosen = [(layer, "weight") for layer in layers(module)]
    return ModelPruning(
        "l1_unstructured",
        chosen,
        amount=amount,
        make_pruning_permanent=permanent,
        use_lottery_ticket_hypothesis=False,
    )


def magnitude(module: LightningModule, amount: float = AMOUNT, at: Any = 1) -> Magnitude:
    """Return ours: after the first epoch, when ModelPruning acts for the first time too."""
    return Magnitude(amount, at=at, measure=False)


class Watch(Callback):
    """Notes the sparsity in the last batch of every epoch, and unknown keys in the state dict."""

    def __init__(self, keys: set[str]) -> None:
        self.keys, self.foreign = keys, 0
        self.by_epoch: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self.by_epoch.append(sparsity(pl_module))
            self.foreign = max(self.foreign, len(pl_module.state_dict().keys() - self.keys))


def fit(module: LightningModule, callbacks: list[Callback], loader: DataLoader, **settings: Any) -> None:
    """Train on the CPU, silently."""
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    path = settings.pop("ckpt_path", None)
    settings.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    Trainer(accelerator="cpu", callbacks=callbacks, **quiet, **settings).fit(module, loader, ckpt_path=path)


def life_of(make: Make, folder: Path) -> dict[str, str]:
    """Train four epochs, resume the checkpoint of the second in a fresh module, and describe both fits."""
    whole = classifier()
    keys, shapes = set(whole.state_dict()), {name: t.shape for name, t in whole.state_dict().items()}
    watch = Watch(keys)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(whole, [make(whole), watch, saver], digits(), max_epochs=EPOCHS)
    path = folder / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    strict = {name: t.shape for name, t in saved.items()} == shapes
    return {
        f"sparsity in epochs 1 to {EPOCHS}": ", ".join(f"{s:.4g}" for s in watch.by_epoch),
        "sparsity when the fit has ended": f"{sparsity(whole):.4g}",
        "`state_dict` keys that the dense module lacks, while it trains": str(watch.foreign),
        "a checkpoint saved in the fit loads strictly into the dense module": "yes" if strict else "no",
        **resume(make, path, keys, whole),
    }


def resume(make: Make, path: Path, keys: set[str], whole: LightningModule) -> dict[str, str]:
    """Go on from the checkpoint of epoch 2 in a fresh module."""
    module, watch = classifier(), Watch(keys)
    in_words = f"sparsity in epochs 3 to {EPOCHS}, resumed after epoch 2"
    equal = "the resumed fit ends with the weights of the uninterrupted one"
    try:
        fit(module, [make(module), watch], digits(), max_epochs=EPOCHS, ckpt_path=path)
    except RuntimeError as error:
        return {
            in_words: f"{type(error).__name__}: {str(error).splitlines()[1].partition(' in ')[0].strip()}",
            equal: "no",
        }
    same = all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    return {
        in_words: ", ".join(f"{s:.4g}" for s in watch.by_epoch),
        equal: "yes, bit for bit" if same else "no",
    }


def defaults() -> dict[str, list[str]]:
    """Describe what both callbacks do when they are given nothing but the fraction."""
    theirs, ours = classifier(), classifier()
    start = [layer.weight.detach().clone() for layer in layers(theirs)]
    callback = ModelPruning("l1_unstructured", amount=AMOUNT)
    fit(theirs, [callback], digits(), max_epochs=1)
    fit(ours, [Magnitude(AMOUNT, at="end", measure=False)], digits(), max_epochs=1)
    names = {id(child): type(child).__name__ for child in theirs.modules()}
    chosen = [f"{names[id(child)]}.{name}" for child, name in callback._parameters_to_prune]
    norms = sum(name.startswith("BatchNorm") for name in chosen)
    return {
        "by default: tensors chosen, of these BatchNorm": [
            f"{len(chosen)}, {norms}",
            f"{len(MaskManager.of(ours).masks)}, 0",
        ],
        "by default: kept weights when a fit of one epoch has ended": [
            went_back(theirs, start),
            went_back(ours, start),
        ],
    }


def went_back(module: nn.Module, start: list[Tensor]) -> str:
    """Say whether the kept weights are trained ones or those from before the training."""
    pairs = [(layer.weight.detach(), first) for layer, first in zip(layers(module), start, strict=True)]
    return (
        "the initial ones" if all(torch.equal(w[w != 0], first[w != 0]) for w, first in pairs) else "the trained ones"
    )


class Clock(Callback):
    """CPU seconds of every step of the second epoch: other programs on the machine do not count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            self.seconds.append(time.process_time() - self.started)


VARIANTS: dict[str, Make | None] = {
    "dense": None,
    "Magnitude": partial(magnitude, amount=0.9),
    "ModelPruning": partial(model_pruning, amount=0.9),
}


def costs(network: Callable[[], nn.Module], inputs: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each variant's fastest step, once per round.

    Args:
        network: builds a classifier of `inputs`.
        inputs: all batches, (steps, N, ...).
        rounds: each trains every variant for two epochs; the second one is timed, with masks in force.
    """
    labels = torch.arange(inputs.shape[1]) % 10
    batches = DataLoader([(batch, labels) for batch in inputs], batch_size=None)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, make in VARIANTS.items():
            module, clock = classifier(network), Clock()
            fit(module, [*([] if make is None else [make(module)]), clock], batches, max_epochs=2)
            seconds[name].append(min(clock.seconds))
    return seconds


def ratio_cell(seconds: list[float], dense: list[float]) -> str:
    """Return the fastest step over the fastest dense one, and the range of this ratio in single rounds."""
    ratios = [one / other for one, other in zip(seconds, dense, strict=True)]
    return f"{min(seconds) / min(dense):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]"


def lives() -> tuple[list[str], list[list[str]]]:
    """Return header and rows: what becomes of masks, keys and checkpoints."""
    variants: dict[str, Make] = {
        "ModelPruning": model_pruning,
        "ModelPruning, not permanent": partial(model_pruning, permanent=False),
        "Magnitude": magnitude,
    }
    found = []
    for make in variants.values():
        with tempfile.TemporaryDirectory() as folder:
            found.append(life_of(make, Path(folder)))
    rows = [[question, *(life[question] for life in found)] for question in found[0]]
    rows += [[question, theirs, "-", ours] for question, (theirs, ours) in defaults().items()]
    return ["", *variants], rows


def step_costs(rounds: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: CPU time of a step over that of a dense one."""
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "MLP 784-1024-1024-10, batch 64": (
            partial(mlpnet, (784, 1024, 1024, 10)),
            torch.randn(10, 64, 784),
        ),
        "ResNet-20, batch 8": (resnet20, torch.randn(5, 8, 3, 32, 32)),
    }
    rows = []
    for name, (network, inputs) in cases.items():
        seconds = costs(network, inputs, rounds)
        rows.append([name, *(ratio_cell(values, seconds["dense"]) for values in seconds.values())])
    return ["", *VARIANTS], rows


def show(title: str, header: list[str], rows: list[list[str]], markdown: bool) -> None:
    """Print a table, on the terminal or as Markdown."""
    console = Console(width=130)
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        console.print(f"{title}\n\n{text}\n", soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(*header, title=title, show_lines=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the cost of a step, >= 1")
    parser.add_argument("--no-cost", action="store_true", help="leave out the table of step times")
    parser.add_argument("--only-cost", action="store_true", help="leave out the other table")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if not given.only_cost:
        show(f"asked: {AMOUNT} of the weights, after the first of {EPOCHS} epochs", *lives(), given.markdown)
    if not given.no_cost:
        title = f"CPU time of a training step / of a dense step (sparsity 0.9, {given.rounds} rounds, 1 thread)"
        show(title, *step_costs(given.rounds), given.markdown)


if __name__ == "__main__":
    main()
