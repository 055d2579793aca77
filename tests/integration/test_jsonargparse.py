"""Every method can be written in a LightningCLI configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from integration.contract import NAMES, Spec, read_spec
from integration.toys import QUIET, Toy, kept_of, masks_of, toy_loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

jsonargparse = pytest.importorskip("jsonargparse")

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*(JSONARGPARSE_DEPRECATION|deprecated in v4)"),  # LightningCLI too
]


@pytest.fixture(params=NAMES)
def spec(request: pytest.FixtureRequest) -> Spec:
    return read_spec(request.param)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return toy_loader()


class Model(Toy):
    """A module whose constructor the command line can read."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)


def test_the_signature_parses_with_the_values_of_the_yaml(spec: Spec) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(spec.kind, "method")
    callback = parser.instantiate_classes(parser.parse_object({"method": spec.arguments})).method
    assert type(callback) is spec.kind
    assert vars(callback).keys() == vars(spec.build()).keys()


def test_the_help_explains_every_argument(spec: Spec) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(spec.kind, "method")
    text = parser.format_help()
    assert [name for name in spec.arguments if f"--method.{name}" not in text] == []


def test_an_argument_that_does_not_exist_is_refused(spec: Spec) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(spec.kind, "method")
    with pytest.raises(jsonargparse.ArgumentError, match="spasity"):
        parser.parse_object({"method": {**spec.arguments, "spasity": 0.5}})


def test_lightning_cli_trains_with_the_callback_from_its_file(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [{"class_path": f"{spec.kind.__module__}.{spec.kind.__name__}", "init_args": spec.small}],
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer}))
    monkeypatch.setattr("sys.argv", ["app", "fit", "--config", str(path)])
    cli = LightningCLI(Model, Data, save_config_callback=None)
    assert kept_of(cli.model, masks_of(cli.model)) < Toy.TOTAL
    assert any(type(callback) is spec.kind for callback in cli.trainer.callbacks)
