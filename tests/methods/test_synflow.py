"""SynFlow: conservation, collapse without rounds, independence of data, the input it finds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import MaskManager, SynFlow, prune
from lightning_prune.methods.synflow import positive_flow, synflow_scores

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:.*smaller than the logging interval",
)


def perceptron() -> nn.Sequential:
    """64-100-100-100-10 without biases."""
    sizes = [64, 100, 100, 100, 10]
    layers: list[nn.Module] = []
    for one, two in pairwise(sizes):
        layers += [nn.Linear(one, two, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_the_flow_of_two_weights_in_a_row_is_their_product() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    weights = {"0.weight": torch.tensor([[-3.0, 2.0]]), "1.weight": torch.tensor([[-5.0]])}
    module.load_state_dict(weights)
    with positive_flow(module, ((torch.zeros(7, 2),), {}), torch.float32) as flow:
        scores = synflow_scores(flow, weights)
        assert float(flow({name: weight.abs() for name, weight in weights.items()})) == 25.0
    assert scores["0.weight"].tolist() == [[15.0, 10.0]]
    assert scores["1.weight"].tolist() == [[25.0]]


def test_the_flow_of_every_layer_adds_up_to_the_output() -> None:
    module = perceptron()
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    with positive_flow(module, ((torch.randn(3, 64),), {})) as flow:
        total = float(flow({name: weight.abs() for name, weight in weights.items()}))
        scores = synflow_scores(flow, weights)
    assert [float(score.sum()) / total for score in scores.values()] == pytest.approx([1.0] * 4, rel=1e-13)


def test_masked_weights_carry_no_flow() -> None:
    module = perceptron()
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}
    with positive_flow(module, ((torch.ones(1, 64),), {})) as flow:
        scores = synflow_scores(flow, weights, masks)
    assert all(float(scores[name][~masks[name]].abs().max()) == 0.0 for name in weights)


@pytest.mark.filterwarnings("ignore:.*keeps less than 1 %")
@pytest.mark.parametrize("sparsity", [0.99, 0.995, 0.999])
def test_many_rounds_keep_every_layer_where_one_round_empties_some(sparsity: float) -> None:
    emptied = {}
    for rounds in (1, 100):
        torch.manual_seed(0)
        module = perceptron()
        prune(
            module,
            SynFlow(sparsity=sparsity, rounds=rounds, min_keep_per_layer=0),
            example_input=torch.ones(1, 64),
        )
        emptied[rounds] = sum(not bool(mask.any()) for mask in MaskManager.of(module).masks.values())
    assert emptied[1] > 0
    assert emptied[100] == 0


def test_the_masks_depend_neither_on_inputs_nor_on_labels(tiny_class: Any) -> None:
    masks = []
    for seed in (0, 1):
        data = TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(3, (8,)))
        torch.manual_seed(0)
        module = tiny_class()
        prune(module, SynFlow(sparsity=0.8, rounds=5, seed=seed), DataLoader(data, batch_size=4))
        masks.append(MaskManager.of(module).masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_signs_of_weights_and_buffers_do_not_matter(tiny: Any) -> None:
    example = ((torch.ones(1, 1, 4, 4),), {})
    tiny.norm.running_mean += torch.tensor([0.5, -0.5, 1.0, -1.0])
    weights = {"conv.weight": tiny.conv.weight.detach().double()}
    with positive_flow(tiny, example) as flow:
        plain = synflow_scores(flow, weights)["conv.weight"]
    tiny.norm.running_mean.neg_()
    with torch.no_grad():
        tiny.hidden.weight.neg_()
    with positive_flow(tiny, example) as flow:
        assert torch.equal(synflow_scores(flow, {"conv.weight": -weights["conv.weight"]})["conv.weight"], plain)


def test_the_module_is_left_as_it_was(tiny_class: Any, loader: DataLoader) -> None:
    module = tiny_class(dropout=0.5)
    module.dropout.eval()
    calls: list[Any] = []
    module.register_forward_pre_hook(lambda module, args: calls.append(args[0].dtype))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    with positive_flow(module, ((torch.ones(2, 1, 4, 4),), {})) as flow:
        assert not module.training
        flow({})
    assert torch.equal(torch.get_rng_state(), state)
    assert [child.training for child in (module, module.norm, module.dropout)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert calls == []


class TwoInputs(LightningModule):
    """Takes numbers, tokens and a scale by name; calls forward from its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(5, 2)

    def forward(self, numbers: Tensor, *, tokens: Tensor, scale: Tensor) -> dict[str, Any]:
        return {"out": self.head(torch.cat([numbers, self.embedding(tokens)], dim=1)) * scale, "name": "two"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["numbers"], tokens=batch["tokens"], scale=torch.tensor(2.0))["out"].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_arguments_by_name_and_trees_of_outputs_are_understood() -> None:
    module = TwoInputs()
    batch = {"numbers": torch.randn(6, 2), "tokens": torch.randint(4, (6,))}
    prune(module, SynFlow(sparsity=0.5, rounds=2), [batch])
    inputs = torch.cat([torch.ones(2), module.embedding.weight[1].detach().abs()])
    expected = (dict(module.named_parameters())["head.weight"].detach().abs() * inputs).flatten()
    kept = MaskManager.of(module).masks["head.weight"].flatten()
    assert int(kept.sum()) == 5
    assert float(expected[kept].min()) > 0


def test_the_input_is_found_in_a_trainer_without_an_example(tiny: Any, loader: DataLoader) -> None:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[SynFlow(sparsity=0.9, measure=False)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(tiny, loader)
    assert MaskManager.of(tiny).counts() == (19, 188)


def test_a_given_shape_needs_no_data(tiny_class: Any) -> None:
    masks = []
    for arguments in ({"input_shape": [1, 4, 4]}, {}):
        torch.manual_seed(0)
        module = tiny_class()
        example = None if arguments else torch.randn(5, 1, 4, 4)
        prune(module, SynFlow(sparsity=0.9, rounds=3, **arguments), example_input=example)
        masks.append(MaskManager.of(module).masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_loss_that_does_not_call_forward_asks_for_the_shape(tiny: Any, loader: DataLoader) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        return module.head(module.hidden(batch[0].flatten(1))).sum()

    with pytest.raises(ValueError, match=r"does not call the module's forward\. Give `input_shape`"):
        prune(tiny, SynFlow(sparsity=0.9), list(loader), loss)


def test_outputs_without_numbers_are_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).argmax(dim=1)

    with pytest.raises(ValueError, match="needs a forward that returns floating tensors"):
        prune(Counts(), SynFlow(sparsity=0.5), example_input=torch.ones(1, 3))


def test_norms_that_rescale_in_evaluation_are_warned_of() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="does not conserve flow through 1: these norms rescale"):
        prune(module, SynFlow(sparsity=0.5, rounds=3), example_input=torch.ones(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "`rounds` must be an integer >= 1"),
        ({"input_shape": [1, 0]}, "`input_shape` must be an integer >= 1, got 0"),
        ({"dtype": "float16"}, "`dtype` must be one of 'float64', 'float32'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynFlow(sparsity=0.5, **arguments)
