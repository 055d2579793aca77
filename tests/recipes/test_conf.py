"""Every configuration of a model, a data module or a trainer composes, fits its target and works."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_prune.recipes import data as data_modules
from lightning_prune.recipes import networks
from lightning_prune.recipes.classifier import LitClassifier

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("model", "data", "trainer")
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NAMES = {group: [name for other, name in FILES if other == group] for group in GROUPS}
SPECIAL = {"_target_", "_convert_", "_partial_"}

# networks of many layers, made thin so that they are built quickly
THIN = {"mlpnet": [], "mobilenet_v1": ["model.network.width=0.25"]}


def composed(group: str, name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        return compose(overrides=[f"+{group}={name}", *overrides])[group]


def targets(config: Any) -> list[dict[str, Any]]:
    """Every node with a `_target_`, outermost first."""
    if not isinstance(config, dict):
        return []
    inner = [node for value in config.values() for node in targets(value)]
    return [config, *inner] if "_target_" in config else inner


def trainer_config(name: str, folder: Path) -> DictConfig:
    options = ["trainer.accelerator=cpu", f"trainer.default_root_dir={folder}"]
    return composed("trainer", name, *options)


def test_every_network_and_data_module_has_a_configuration():
    assert NAMES["model"] == sorted(networks.__all__)
    assert NAMES["data"] == ["cifar10", "digits", "fashion_mnist", "mnist", "random"]
    assert NAMES["trainer"] == ["ddp", "default", "fsdp", "gpu"]


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_key_is_an_argument_of_its_target(group: str, name: str):
    for node in targets(OmegaConf.to_container(composed(group, name), resolve=False)):
        arguments = inspect.signature(get_object(node["_target_"])).parameters
        assert set(node) - SPECIAL <= set(arguments), node["_target_"]


@pytest.mark.parametrize(("group", "name"), [file for file in FILES if file[0] != "trainer"])
def test_every_argument_of_our_own_targets_is_listed(group: str, name: str):
    nodes = targets(OmegaConf.to_container(composed(group, name)))
    for node in (node for node in nodes if node["_target_"].startswith("lightning_prune.recipes")):
        filled_in = {"optimizer", "total_steps"} if node.get("_partial_") else set()
        arguments = set(inspect.signature(get_object(node["_target_"])).parameters)
        assert set(node) - SPECIAL == arguments - filled_in, node["_target_"]


@pytest.mark.parametrize("name", NAMES["data"])
def test_a_data_configuration_holds_the_defaults_of_its_class(name: str):
    node = OmegaConf.to_container(composed("data", name))
    for key, parameter in inspect.signature(get_object(node["_target_"])).parameters.items():
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        assert node[key] == default, key


@pytest.mark.parametrize("name", NAMES["model"])
def test_a_network_configuration_holds_the_defaults_of_its_function(name: str):
    node = OmegaConf.to_container(composed("model", name))["network"]
    for key, parameter in inspect.signature(get_object(node["_target_"])).parameters.items():
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        assert node[key] == default, key


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_setting_has_a_comment(group: str, name: str):
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        key, _, value = line.strip().partition(":")
        if value.strip() and not line.startswith("#") and key not in SPECIAL | {"defaults"}:
            assert "    # " in line, line


@pytest.mark.parametrize("name", NAMES["model"])
def test_a_model_configuration_gives_a_classifier_that_trains(name: str):
    model = instantiate(composed("model", name, *THIN.get(name, ["model.network.width=4"])))
    assert isinstance(model, LitClassifier)
    assert (model.num_classes, model.scheduler_interval) == (10, "step")
    size = (784,) if name == "mlpnet" else (1, 8, 8) if name == "convnet" else (3, 32, 32)
    assert model(torch.randn(2, *size)).shape == (2, 10)
    optimizer = model.make_optimizer(model.parameters())
    scheduler = model.make_scheduler(optimizer, total_steps=10)
    assert scheduler.get_last_lr()[0] < optimizer.defaults["lr"]
    assert type(optimizer.defaults["momentum"]) is float


@pytest.mark.parametrize("name", NAMES["data"])
def test_a_data_configuration_gives_a_data_module(name: str):
    module = instantiate(composed("data", name))
    assert isinstance(module, LightningDataModule)
    assert type(module).__name__ in data_modules.__all__
    assert module.num_classes == 10
    assert all(isinstance(size, int) for size in module.input_shape)


@pytest.mark.parametrize("name", NAMES["trainer"])
def test_a_trainer_configuration_gives_a_trainer(name: str, tmp_path: Path):
    config = trainer_config(name, tmp_path)
    assert "callbacks" not in config
    trainer = instantiate(config, callbacks=[])
    assert isinstance(trainer, Trainer)
    assert trainer.max_epochs == config.max_epochs
    assert trainer.world_size == (2 if name in ("ddp", "fsdp") else 1)
    assert trainer.precision == ("bf16-mixed" if name == "gpu" else "32-true")


def test_the_folder_of_a_run_is_hydras(tmp_path: Path):
    raw = OmegaConf.to_container(composed("trainer", "default"), resolve=False)
    assert raw["default_root_dir"] == "${hydra:runtime.output_dir}"


def test_sharding_follows_the_number_of_devices(tmp_path: Path):
    assert trainer_config("fsdp", tmp_path).strategy.data_parallel_size == 2
    config = composed("trainer", "fsdp", "trainer.devices=4", f"trainer.default_root_dir={tmp_path}")
    assert config.strategy.data_parallel_size == 4


def test_the_default_configurations_train_digits(tmp_path: Path):
    options = [
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        "trainer.enable_checkpointing=false",
    ]
    config = [*options, "trainer.accelerator=cpu", f"trainer.default_root_dir={tmp_path}"]
    trainer = instantiate(composed("trainer", "default", *config))
    model = instantiate(composed("model", "convnet"))
    trainer.fit(model, instantiate(composed("data", "digits", "data.subset=320")))
    assert trainer.global_step == 320 // 64
    assert trainer.callback_metrics["val_accuracy"] > 0.1
