"""The application's own model and data: forecasting a noisy mixture of seasons with dilated convolutions."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Forecaster(LightningModule):
    """Read `history` values and forecast the next `horizon`, by causal convolutions of growing dilation.

    Args:
        channels: of the convolutions, >= 1.
        history: values read, >= 16.
        horizon: values forecast, >= 1.
        learning_rate: of AdamW, > 0.
    """

    def __init__(self, channels: int = 32, history: int = 48, horizon: int = 12, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lift = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList(nn.Conv1d(channels, channels, 3, dilation=2**level) for level in range(4))
        self.head = nn.Linear(channels, horizon)

    def forward(self, history: Tensor) -> Tensor:
        """Values (N, history) -> forecasts (N, horizon), as differences from the last value."""
        features = self.lift(history.unsqueeze(1))
        for level, convolution in enumerate(self.blocks):
            padded = nn.functional.pad(features, (2 * 2**level, 0))
            features = features + torch.relu(convolution(padded))
        return history[:, -1:] + self.head(features[:, :, -1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        history, future = batch
        return nn.functional.mse_loss(self(history), future)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the squared error, divided by that of repeating the last value."""
        history, future = batch
        naive = nn.functional.mse_loss(history[:, -1:].expand_as(future), future)
        self.log("test_error", nn.functional.mse_loss(self(history), future) / naive)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class Seasons(LightningDataModule):
    """Windows of one series: two seasons, a slow trend and noise; the last part of it is the test.

    Args:
        length: of the series, >= 200.
        history: values read, >= 1.
        horizon: values forecast, >= 1.
        batch_size: windows in a batch, >= 1.
        noise: standard deviation of the noise, >= 0; the seasons have amplitude 1.
        seed: of the noise.
    """

    def __init__(
        self,
        length: int = 2000,
        history: int = 48,
        horizon: int = 12,
        batch_size: int = 64,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.length, self.history, self.horizon = length, history, horizon
        self.batch_size, self.noise, self.seed = batch_size, noise, seed

    def setup(self, stage: str) -> None:
        """Draw the series and cut it into windows; the test begins where the training ends."""
        time = torch.arange(self.length, dtype=torch.float32)
        clean = torch.sin(2 * math.pi * time / 24) + torch.sin(2 * math.pi * time / 7.5) + time / self.length
        generator = torch.Generator().manual_seed(self.seed)
        series = clean + self.noise * torch.randn(self.length, generator=generator)
        cut = int(0.8 * self.length)
        self.train, self.test = self._windows(series[:cut]), self._windows(series[cut:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, len(self.test))

    def _windows(self, series: Tensor) -> TensorDataset:
        windows = series.unfold(0, self.history + self.horizon, 1)
        return TensorDataset(windows[:, : self.history], windows[:, self.history :])
