"""RNGState: the global random states in the checkpoint, for a bitwise resume of training with dropout.

Lightning saves no random state. Masks need none of it (their randomness is derived from `seed` and the event number);
dropout and augmentation in the training process do.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_prune.callback import RNG_STATE_KEY
from lightning_prune.sandbox import rng_states, set_rng_states


class RNGState(Callback):
    """Save Python's, NumPy's and torch's random states with every checkpoint, one entry per rank, and restore them.

    Put it last in the list of callbacks, so that nothing draws random numbers after it has restored the states.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: list[dict[str, Any]] | None = None
        self._between_epochs = False

    @property
    @override
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return RNG_STATE_KEY

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "ranks": _gather(rng_states())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = list(state_dict["ranks"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None  # of a test run with `ckpt_path`

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        self._between_epochs = bool(progress.get("is_last_batch", False)) and trainer.state.fn == "fit"
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and self._between_epochs:
            self._restore(trainer, state["ranks"])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between epochs the uninterrupted run saves first and draws the next order of the data afterwards. A resumed
        # run draws it before on_train_start, or, if configure_optimizers asks for the length of the fit, before this.
        if self._between_epochs and trainer.train_dataloader is None:
            self._restore(trainer, self._loaded)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._between_epochs:
            self._restore(trainer, self._loaded)
        self._loaded, self._between_epochs = None, False

    def _restore(self, trainer: Trainer, ranks: list[dict[str, Any]] | None) -> None:
        if ranks is not None and trainer.global_rank < len(ranks):
            set_rng_states(ranks[trainer.global_rank])


def _gather(states: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [states]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, states)
    return gathered
