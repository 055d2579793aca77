"""`python examples/hydra_app/app.py` : an application of your own, pruned by one line of its configuration.

    python examples/hydra_app/app.py pruning=halfway
    python examples/hydra_app/app.py pruning=gradual_magnitude callbacks.pruning.every_n_steps=20
    python examples/hydra_app/app.py -m pruning=magnitude,random callbacks.pruning.sparsity=0.5,0.9
    python examples/hydra_app/app.py trainer=from_config pruning=random
    python examples/hydra_app/app.py pruning=none

The program names no pruning method: `conf/config.yaml` chooses one from the group `pruning`, which Hydra
finds because lightning_prune is installed.
"""

from __future__ import annotations

import warnings

import hydra
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_prune import MaskManager, instantiate_callbacks


def make_trainer(cfg: DictConfig) -> Trainer:
    """Return the Trainer of the configuration, with its callbacks.

    Lightning wants a list where a configuration holds a mapping. `trainer=from_config` makes the list in YAML
    with `${oc.dict.values:callbacks}`; otherwise `instantiate_callbacks` does, and drops those set to null.
    """
    if "callbacks" in cfg.trainer:
        return instantiate(cfg.trainer)
    return instantiate(cfg.trainer, callbacks=instantiate_callbacks(cfg.get("callbacks")))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Train, prune and test a forecaster; returns the test error, which sweepers read."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    seed_everything(cfg.seed, workers=True, verbose=False)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    trainer = make_trainer(cfg)
    trainer.fit(model, datamodule=data)
    result = trainer.test(model, datamodule=data, verbose=False)[0]

    table = Table("", "value", title=f"{cfg.get('callbacks', {}).get('pruning', {}).get('_target_', 'dense')}")
    table.add_row("test error (1 = repeating the last value)", f"{result['test_error']:.4f}")
    table.add_row("sparsity", f"{MaskManager.of(model).sparsity():.6g}")
    Console().print(table)
    return result["test_error"]


if __name__ == "__main__":
    main()
