"""`python examples/nbeats_forecaster.py` : prune pytorch-forecasting's N-BEATS with `pip install pytorch-forecasting`.

The module, its data set and its loss are theirs; pruning is one callback. A small N-BEATS learns generated series, loses
whole hidden units, is fine-tuned, and is cut to a physically smaller network with the same forecasts.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from pytorch_forecasting import NBeats, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data
from torch.utils.data import DataLoader

from lightning_prune import Magnitude, shrink


def series() -> TimeSeriesDataSet:
    """Return windows of 30 steps of generated seasonal series; the task is the next 10."""
    frame = generate_ar_data(seasonality=10.0, timesteps=100, n_series=20, seed=0)
    frame["series"] = frame["series"].astype(str)
    lengths = {"min_encoder_length": 30, "max_encoder_length": 30}
    lengths |= {"min_prediction_length": 10, "max_prediction_length": 10}
    columns = {"group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
    return TimeSeriesDataSet(frame, time_idx="time_idx", target="value", **columns, **lengths)


@torch.no_grad()
def error(model: LightningModule, loader: DataLoader) -> float:
    """Return the mean absolute error of the forecasts."""
    model.eval()
    errors = [(model(x)["prediction"].squeeze(-1) - y[0]).abs().mean() for x, y in loader]
    return float(torch.stack(errors).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training, and of fine-tuning")
    epochs = parser.parse_args().epochs
    seed_everything(0, verbose=False)
    data = series()
    train = data.to_dataloader(train=True, batch_size=64, num_workers=0)
    test = data.to_dataloader(train=False, batch_size=64, num_workers=0)
    model = NBeats.from_dataset(data, widths=[32, 128], num_blocks=[1, 1], learning_rate=3e-3, log_interval=-1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_epochs=epochs, **quiet).fit(model, train)
    dense = error(model, test)
    pruning = Magnitude(budget=0.5, budget_type="params", min_keep=4)
    Trainer(max_epochs=epochs, callbacks=[pruning], **quiet).fit(model, train)  # ends with its receipt
    small = shrink(model, next(iter(test)))
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, small)]
    print(f"mean absolute error: dense {dense:.3f}, pruned {error(model, test):.3f}, shrunk {error(small, test):.3f}")
    print(f"parameters: dense {sizes[0]:,}, shrunk {sizes[1]:,}")


if __name__ == "__main__":
    main()
