"""The README's snippets run as they stand there and do what it says; its two commands can be copied."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import MaskManager

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = ("callback", "pipeline", "notebook")
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence)",
    re.M | re.S,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".*does not have many workers",
        r".*is smaller than the logging interval",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"Checkpoint directory .* exists and is not empty",
        r"Starting from v1.9.0, `tensorboardX`",
        r".* left no weight in",
    )
]


class ReadersModel(LightningModule):
    """Stands for the reader's own module: a classifier of 1 x 8 x 8 images, with BatchNorm and dropout.

    Prunable: 72 + 1,152 + 2,048 + 320 = 3,592 weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Linear(64, 32)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.hidden(self.features(images)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class ReadersData(LightningDataModule):
    """Stands for the reader's own data: 192 images, twelve shuffled batches an epoch."""

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(192, 1, 8, 8, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(192) % 10), batch_size=16, shuffle=True)


def quiet_trainer(**settings: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **quiet, **settings)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a snippet finds: `model`, `data`, and a trained `dense.ckpt` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    model, data = ReadersModel(), ReadersData()
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False)
    trainer.fit(ReadersModel(), datamodule=data)
    trainer.save_checkpoint("dense.ckpt")
    before = dict(os.environ)
    yield {"model": model, "data": data, "__name__": "snippet"}
    os.environ.clear()
    os.environ.update(before)  # seed_everything(workers=True) leaves a variable behind


def blocks(text: str, language: str = "python") -> list[tuple[str, str]]:
    """Return (the line above, the code) of every fenced block in a language, in order."""
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == language:
            above = text[: match.start()].rstrip("\n").rpartition("\n")[2].strip()
            indent = len(match["indent"])
            found.append((above, "".join(line[indent:] for line in match["code"].splitlines(keepends=True))))
    return found


def snippet(name: str) -> str:
    """Return the code of the fenced block below `<!-- snippet: NAME -->`."""
    (code,) = [
        code for above, code in blocks(README.read_text(encoding="utf-8")) if above == f"<!-- snippet: {name} -->"
    ]
    return code


def run_snippet(name: str, given: dict[str, Any]) -> dict[str, Any]:
    exec(compile(snippet(name), f"README.md: {name}", "exec"), given)
    return given


def zeros_of(module: nn.Module) -> tuple[int, int]:
    """Count the exact zeros and all entries of the weights of linear layers and convolutions."""
    weights = [m.weight for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def test_every_marked_snippet_is_one_that_a_test_runs() -> None:
    marks = re.findall(r"^<!-- snippet: (\w+) -->$", README.read_text(encoding="utf-8"), re.M)
    assert sorted(marks) == sorted(SNIPPETS)


def test_the_callback_snippet_ends_at_nine_tenths_and_prints_a_receipt(given: dict[str, Any], capsys: Any) -> None:
    keys = list(given["model"].state_dict())
    run_snippet("callback", given)
    zeros, total = zeros_of(given["model"])
    assert (zeros, total) == (int(0.9 * 3592), 3592)
    assert list(given["model"].state_dict()) == keys
    assert len(given["pruning"].history) > 1
    printed = capsys.readouterr().out
    assert f"\n{1 - (total - zeros) / total}\n" in f"\n{printed}"
    assert "asked for sparsity 0.9" in printed


def test_the_pipeline_snippet_turns_a_checkpoint_into_a_pruned_one(given: dict[str, Any]) -> None:
    run_snippet("pipeline", given)
    dense = torch.load("dense.ckpt", weights_only=True)["state_dict"]
    pruned = torch.load("pruned.ckpt", weights_only=True)["state_dict"]
    assert {name: t.shape for name, t in dense.items()} == {name: t.shape for name, t in pruned.items()}
    fresh = ReadersModel()
    fresh.load_state_dict(pruned, strict=True)
    assert zeros_of(fresh) == (int(0.95 * 3592), 3592)
    assert MaskManager.of(fresh).masks == {}
    MaskManager.of(fresh).load("masks.safetensors")
    assert MaskManager.of(fresh).counts() == (3592 - int(0.95 * 3592), 3592)


def test_the_notebook_snippet_keeps_two_of_every_four(given: dict[str, Any], capsys: Any) -> None:
    network = run_snippet("notebook", given)["network"]
    for layer in (network[0], network[2]):
        assert ((layer.weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert given["receipt"].reached["flops"]["dense"] == 2 * (64 * 256 + 256 * 10)
    assert "Zeros in dense tensors do not make this model faster" in capsys.readouterr().out


@pytest.mark.parametrize(("mark", "last"), [("main command", "lightning-prune"), ("test command", "python -m pytest")])
def test_the_two_commands_install_with_the_constraints(mark: str, last: str) -> None:
    (code,) = [
        code for above, code in blocks(README.read_text(encoding="utf-8"), "bash") if above == f"<!-- {mark} -->"
    ]
    lines = code.strip().splitlines()
    assert lines[0].startswith("python3 -m venv")
    installs = [line for line in lines if line.startswith("pip install")]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    assert lines[-1] == last
    assert (README.parent / "constraints.txt").is_file()
