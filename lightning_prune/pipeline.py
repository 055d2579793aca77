"""The main job: dense training, pruning, fine-tuning, test, receipt; checkpoint in, smaller checkpoint out.

One run leaves in its folder: `dense.ckpt`, `pruned.ckpt`, `masks.safetensors`, `model.safetensors`, `receipt.json`,
`receipt.md`, `receipt.png`; while it runs also `last.ckpt`, and after Ctrl-C or an error `interrupted.ckpt`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from lightning_prune.callback import PruningCallback
from lightning_prune.files import replacing
from lightning_prune.instantiate import instantiate_callbacks
from lightning_prune.masks import MaskManager
from lightning_prune.receipt import Receipt
from lightning_prune.report import cost_receipt, fit_receipt
from lightning_prune.shrink import FORMAT as SHRUNK
from lightning_prune.shrink import load_shrunk, save_shrunk
from lightning_prune.smaller import Smaller, smaller_copy

DENSE_NOTES = "_lightning_prune_notes"  # attribute of a module: sentences about it from before it was pruned


class AfterPruning(Callback):
    """Keep the weights as they were right after the last pruning event, before fine-tuning repaired them.

    Its own state is the accuracy of the dense network, which a resumed run cannot measure any more.
    """

    def __init__(self, dense_accuracy: float | None = None) -> None:
        super().__init__()
        self.state: dict[str, Tensor] | None = None
        self.dense_accuracy = dense_accuracy

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"dense_accuracy": self.dense_accuracy}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.dense_accuracy = state_dict["dense_accuracy"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state is None and all(pruner.finished for pruner in pruners_of(trainer.callbacks)):
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()}


class InterruptedCheckpoint(Callback):
    """Save `interrupted.ckpt` on Ctrl-C or an error.

    Lightning's own OnExceptionCheckpoint makes every later `fit(ckpt_path=None)` go on from the last checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "interrupted.ckpt"

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.global_step > 0:
            trainer.save_checkpoint(self.path)
            rank_zero_info(f"Interrupted; go on with resume={_short(self.path)}")


def run(cfg: DictConfig, folder: str | os.PathLike[str]) -> float | None:
    """Run the main job and return the final test accuracy (None if the module logs none).

    Args:
        cfg: the composed configuration (`conf/prune.yaml`).
        folder: where all files go; made if missing.
    Raises:
        ValueError: a configuration or a checkpoint that does not fit.
    """
    folder = Path(folder)
    seed_everything(int(cfg.seed), workers=True, verbose=False)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    callbacks = instantiate_callbacks(cfg.callbacks)
    pruners = pruners_of(callbacks)
    for pruner in pruners:
        pruner.measure = False  # one receipt for the whole run, at its end
    resume = _existing(cfg.resume, "resume")
    pruning_resumed = resume is not None and has_pruning_state(resume)
    trained = starts_trained(cfg, pruners)
    if trained and not pruning_resumed:
        _make_dense(cfg, model, data, callbacks, resume, folder)
    accuracy: dict[str, float | None] = {"dense": None, "pruned": None, "finetuned": None}
    if trained and not pruning_resumed:
        accuracy["dense"] = evaluate(cfg, model, data)
    if pruners:
        epochs = int(cfg.trainer.max_epochs) + (
            0 if trained or cfg.dense.enabled is False else int(cfg.dense.max_epochs)
        )
        watcher = AfterPruning(accuracy["dense"])
        trainer = _trainer(cfg, [*callbacks, watcher], epochs, folder)
        trainer.fit(model, datamodule=data, ckpt_path=resume if pruning_resumed else None, weights_only=True)
        trainer.save_checkpoint(folder / "pruned.ckpt")
        accuracy["dense"], accuracy["finetuned"] = watcher.dense_accuracy, evaluate(cfg, model, data)
        if watcher.state is not None and trained and not pruning_resumed:
            accuracy["pruned"] = evaluate(cfg, model, data, watcher.state)
    _write_results(cfg, model, data, pruners, accuracy, folder)
    return accuracy["finetuned"] if pruners else accuracy["dense"]


def pruners_of(callbacks: list[Any]) -> list[PruningCallback]:
    """Return the pruning callbacks of a list, in order."""
    return [callback for callback in callbacks if isinstance(callback, PruningCallback)]


def evaluate(
    cfg: DictConfig, model: LightningModule, data: Any, state: Mapping[str, Tensor] | None = None
) -> float | None:
    """Return the test metric `cfg.metric` of `model` (of a copy with the weights `state`, if given)."""
    subject = model
    if state is not None:
        subject = copy.deepcopy(model)
        subject.load_state_dict(state)
    trainer = instantiate(
        cfg.trainer, callbacks=[], enable_checkpointing=False, enable_progress_bar=False, logger=False
    )
    results = trainer.test(subject, datamodule=data, verbose=False)
    return next((float(result[cfg.metric]) for result in results if cfg.metric in result), None)


def load_weights(model: LightningModule, path: str | os.PathLike[str]) -> None:
    """Load the weights of a Lightning checkpoint or a safetensors file strictly into `model` (or its `network`).

    The file of a shrunk module (`save_shrunk`, or `model.safetensors` of a run that removed channels) cuts `model` first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or belongs to another model; `model` is unchanged then.
    """
    path = str(_existing(path, "ckpt_path"))
    try:
        if path.endswith(".safetensors"):
            if _holds_shrunk(path):
                load_shrunk(lambda: model, path)
                return
            state = load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            state = checkpoint.get("state_dict", checkpoint)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`ckpt_path` {path!r} cannot be read ({error}). Give a Lightning checkpoint or a safetensors file."
        ) from error
    own = model.state_dict()
    inner = getattr(model, "network", None)
    target = (
        inner
        if state.keys() != own.keys() and inner is not None and state.keys() == inner.state_dict().keys()
        else model
    )
    wanted = target.state_dict()
    wrong = sorted(state.keys() ^ wanted.keys()) or [name for name in wanted if wanted[name].shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"`ckpt_path` {path!r} belongs to another model: {len(wrong)} tensors do not fit, first {wrong[0]!r}. "
            "Choose the model it was trained with (model=...)."
        )
    target.load_state_dict(state)


def has_pruning_state(path: str) -> bool:
    """Whether a checkpoint was written by a fit with pruning callbacks."""
    keys = torch.load(path, map_location="cpu", weights_only=True).get("callbacks", {})
    return any(str(key).startswith("lightning_prune.") for key in keys)


def starts_trained(cfg: DictConfig, pruners: list[PruningCallback]) -> bool:
    """Whether pruning starts from a trained network: a given one, or one that this run trains first."""
    if cfg.ckpt_path is not None or cfg.dense.enabled is not None:
        return cfg.ckpt_path is not None or bool(cfg.dense.enabled)
    return all(pruner.prunes_trained for pruner in pruners)


def _holds_shrunk(path: str) -> bool:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == SHRUNK


def _make_dense(
    cfg: DictConfig, model: LightningModule, data: Any, callbacks: list[Any], resume: str | None, folder: Path
) -> None:
    """Load the given trained network, or train one."""
    if cfg.ckpt_path is not None:
        load_weights(model, cfg.ckpt_path)
        return
    others = [callback for callback in callbacks if not isinstance(callback, PruningCallback)]
    trainer = _trainer(cfg, copy.deepcopy(others), int(cfg.dense.max_epochs), folder)
    rank_zero_info(f"Dense training, {cfg.dense.max_epochs} epochs.")
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "dense.ckpt")


def _trainer(cfg: DictConfig, callbacks: list[Any], epochs: int, folder: Path) -> Trainer:
    callbacks = [*callbacks, InterruptedCheckpoint(folder)]
    return instantiate(cfg.trainer, callbacks=callbacks, max_epochs=epochs, default_root_dir=str(folder))


def _write_results(
    cfg: DictConfig,
    model: LightningModule,
    data: Any,
    pruners: list[PruningCallback],
    accuracy: dict[str, float | None],
    folder: Path,
) -> None:
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    example = _example(model, data, int(cfg.measure.batch_size))
    smaller = Smaller()
    if example is not None and any(pruner.removes_channels for pruner in pruners):
        smaller = smaller_copy(model, example)
    receipt = (
        fit_receipt(pruners[-1], model, example, max_seconds=cfg.measure.seconds, smaller=smaller)
        if pruners
        else cost_receipt(model, example)
    )
    receipt.accuracy.update(accuracy)
    receipt.seed = int(cfg.seed)
    receipt.notes += getattr(model, DENSE_NOTES, [])
    if pruners:
        MaskManager.of(model).save(folder / "masks.safetensors")
    if smaller.module is None:
        save_model(model, folder / "model.safetensors")
    else:
        save_shrunk(smaller.module, folder / "model.safetensors")
        receipt.bytes["pruned"] = (folder / "model.safetensors").stat().st_size
        receipt.notes.append("model.safetensors holds the smaller module; `load_shrunk(factory, path)` rebuilds it.")
    _show(receipt, folder)


def save_model(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the `state_dict` of a module to a safetensors file; tensors that share memory are written once each."""
    with replacing(path) as temporary:
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


def _show(receipt: Receipt, folder: Path) -> None:
    written = receipt.save(folder)
    receipt.show()
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    rank_zero_info(f"Written to {_short(folder)}: {', '.join(names) or written}")


def _short(folder: Path) -> str:
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def _example(
    model: LightningModule, data: LightningDataModule, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs of one forward call: the module's own example, else the first tensor of a test batch."""
    given = getattr(model, "example_input_array", None)
    if isinstance(given, Tensor):
        return (given[:1].expand(size, *given.shape[1:]).clone(),), {}
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    first = batch[0] if isinstance(batch, (list, tuple)) else batch
    return ((first[:size],), {}) if isinstance(first, Tensor) else None


def _existing(path: str | os.PathLike[str] | None, argument: str) -> Any:
    if path is None:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{argument}` must be an existing file, got {os.fspath(path)!r}.")
    return os.fspath(path)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values."""
    return dict(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
