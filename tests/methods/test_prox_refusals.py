"""What ProxSGD refuses, and with which advice, before anything has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import QUIET, TwoOptimizers, fit, same, sgd, toy, toy_loader, toy_loss, weights_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import ProxSGD, prune

pytestmark = QUIET


def method(penalty: Any = "auto", **arguments: Any) -> ProxSGD:
    return ProxSGD(penalty, measure=False, **arguments)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "much", None, True])
def test_a_penalty_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="`penalty` must be a finite number >= 0 or 'auto'"):
        ProxSGD(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 0.5, "end": 0.5}, "`begin` must lie before `end`"),
        ({"begin": -1}, "`begin` must be an int >= 0"),
        ({"end": 1.5}, "`end` must be an int >= 0"),
        ({"group_weight": "size"}, "`group_weight` must be one of"),
        ({"auto_factor": 0.0}, "`auto_factor` must be a finite number above 0"),
        ({"structured": 1}, "`structured` must be true or false"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxSGD("auto", **arguments)


def test_lbfgs_is_refused_before_anything_has_changed() -> None:
    module = toy(make_optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1))
    before = weights_of(module)
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times"):
        fit(module, method())
    assert same(weights_of(module), before)


def test_an_optimizer_without_a_known_step_is_refused_with_advice() -> None:
    module = toy(make_optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"got Adagrad.*target form, HSPG\(sparsity=...\)"):
        fit(module, method())


class SplitChannels(TwoOptimizers):
    """Weights in one optimizer, norms and biases in the other."""

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.dim() > 1]
        return sgd(weights), sgd([p for p in self.parameters() if p.dim() == 1])


def test_a_channel_in_two_optimizers_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"channels of 'conv' lie in tensors of two optimizers"):
        fit(toy(kind=SplitChannels), method(structured=True, loss_fn=toy_loss))


def test_a_fit_that_goes_on_from_a_dense_checkpoint_past_begin_is_refused(tmp_path: Path) -> None:
    trainer = fit(toy(), max_epochs=1, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(MisconfigurationException, match=r"`begin` \(step 0\) lies before step 6"):
        fit(toy(), method(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_fit_of_unknown_length_needs_steps() -> None:
    with pytest.raises(MisconfigurationException, match="is a fraction of the fit, whose length is not known"):
        fit(toy(), method(), max_epochs=-1, max_steps=-1)


def test_pruning_without_training_is_refused() -> None:
    with pytest.raises(ValueError, match="prox_sgd works while a network is trained"):
        prune(toy(), method(), toy_loader(), loss_fn=toy_loss)


def test_nothing_trained_is_refused() -> None:
    module = toy(make_optimizer=lambda p: torch.optim.SGD([list(p)[1]], lr=0.1))
    with pytest.raises(ValueError, match=r"no optimizer updates any of conv\.weight"):
        fit(module, method())
    with pytest.raises(ValueError, match=r"no channel to prune \(.*hidden: no optimizer trains them"):
        fit(toy(make_optimizer=lambda p: torch.optim.SGD(list(p)[-1:], lr=0.1)), method(structured=True))
