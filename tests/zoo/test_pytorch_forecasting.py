"""A real third-party LightningModule: pytorch-forecasting's N-BEATS on the series that its own generator makes.

It wants an environment of its own: `pip install lightning-prune pytorch-forecasting pytest pytest-timeout`, then
`pytest -m zoo tests/zoo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.contract import NAMES, Spec, read_spec, target_kept
from integration.toys import QUIET, Watch, kept_of, leaks, make_trainer, masks_of, same, weights_of
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import Magnitude

forecasting = pytest.importorskip(
    "pytorch_forecasting", reason="pytorch-forecasting is not installed; it wants an environment of its own"
)

pytestmark = [
    pytest.mark.zoo,
    *QUIET,
    pytest.mark.filterwarnings("default"),  # what foreign code warns of is not the subject
]


@pytest.fixture(scope="module")
def series() -> Any:
    from pytorch_forecasting.data.examples import generate_ar_data

    frame = generate_ar_data(seasonality=10.0, timesteps=60, n_series=4, seed=42)
    frame["series"] = frame["series"].astype(str)
    lengths = {"min_encoder_length": 16, "max_encoder_length": 16}
    lengths |= {"min_prediction_length": 4, "max_prediction_length": 4}
    columns = {"group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
    return forecasting.TimeSeriesDataSet(frame, time_idx="time_idx", target="value", **columns, **lengths)


def network(series: Any) -> Any:
    torch.manual_seed(0)
    shape = {"widths": [16, 32], "num_blocks": [1, 1], "num_block_layers": [2, 2]}
    return forecasting.NBeats.from_dataset(series, **shape, backcast_loss_ratio=1.0, learning_rate=1e-2)


def train(module: Any, series: Any, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(*callbacks, limit_train_batches=6, **settings)
    loader = series.to_dataloader(train=True, batch_size=16, num_workers=0, shuffle=False)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return trainer


@pytest.fixture(params=NAMES)
def spec(request: pytest.FixtureRequest) -> Spec:
    return read_spec(request.param)


def test_every_method_prunes_nbeats(spec: Spec, series: Any) -> None:
    module, watch, callback = network(series), Watch(), spec.build()
    train(module, series, callback, watch)
    assert watch.found == [] == leaks(module)
    assert watch.pruned_steps > 0
    if spec.counts_weights:
        assert sum(int(mask.sum()) for mask in masks_of(module).values()) == target_kept(callback, module)


def test_sparsity_zero_is_training_without_the_callback(spec: Spec, series: Any) -> None:
    spec.needs("sparsity")
    dense, module = network(series), network(series)
    torch.manual_seed(1)
    train(dense, series)
    torch.manual_seed(1)
    train(module, series, spec.build(sparsity=0.0))
    assert same(weights_of(module), weights_of(dense))


def test_scores_leave_no_trace_in_the_outputs_that_nbeats_collects(spec: Spec, series: Any) -> None:
    """Its training step appends to a list that `on_train_epoch_end` reads."""
    module, dense, collected = network(series), network(series), []
    for network_, callbacks in ((dense, []), (module, [spec.build()])):
        end = network_.on_epoch_end
        network_.on_epoch_end = lambda outputs, end=end: (collected.append(len(outputs)), end(outputs))
        train(network_, series, *callbacks, max_epochs=1)
    assert collected[0] == 6
    assert set(collected) == {6}


def test_a_pruned_nbeats_resumes_and_still_forecasts(series: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, resumed = network(series), network(series)
    train(module, series, Magnitude(0.8, layer_floor=0.05, measure=False), saver, enable_checkpointing=True)
    again = Magnitude(0.8, layer_floor=0.05, measure=False)
    train(resumed, series, again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(masks_of(resumed), masks_of(module))
    assert kept_of(resumed, masks_of(resumed)) == sum(int(mask.sum()) for mask in masks_of(module).values())
    loaded = forecasting.NBeats.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=False)
    assert leaks(loaded, masks_of(module)) == []
    batch, _ = next(iter(series.to_dataloader(train=False, batch_size=4)))
    assert loaded(batch)["prediction"].isfinite().all()
