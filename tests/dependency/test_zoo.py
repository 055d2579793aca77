"""Models that nobody here wrote, half of each group's units removed at random; run with -m zoo in an environment of its own.

Each package that is not installed is skipped. A test prints what was removed, and what was refused and why.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune._shrink_probe import make_probe, mask_units
from lightning_prune.cost import CostModel
from lightning_prune.dependency import channel_groups
from lightning_prune.measure import count_parameters
from lightning_prune.shrink import report_of, shrink

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


def images(size: int = 64, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


TORCHVISION = {
    "alexnet": 64, "vgg11_bn": 32, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "efficientnet_b0": 64, "densenet121": 64, "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64, "regnet_y_400mf": 64, "convnext_tiny": 64, "mnasnet0_5": 64, "vit_b_16": 224, "swin_t": 64,
}  # fmt: skip
TIMM = {
    "resnet10t": 64, "vit_tiny_patch16_224": 224, "mobilenetv4_conv_small": 64, "efficientvit_b0": 64,
    "mixer_s32_224": 224, "convmixer_768_32": 64, "poolformer_s12": 64, "levit_128s": 224, "ghostnet_050": 64,
    "lcnet_050": 64, "repvgg_a0": 64, "res2net50_26w_4s": 64, "hrnet_w18_small": 64, "dla34": 64,
    "edgenext_xx_small": 64, "cait_xxs24_224": 224, "mobilevit_xxs": 64, "xcit_nano_12_p16_224": 224,
    "dm_nfnet_f0": 64, "swinv2_cr_tiny_ns_224": 224, "fastvit_t8": 64, "caformer_s18": 64,
}  # fmt: skip
SEGMENTATION = ("Unet", "UnetPlusPlus", "FPN", "Linknet", "DeepLabV3Plus", "MAnet", "PAN", "PSPNet")
GRAPHS = ("GCN", "GraphSAGE", "GIN", "GAT")


_OPERATORS: list[Any] = []  # kept alive: a library that is collected takes its operators with it


def _torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    _torchvision_first()
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(), images(TORCHVISION[name])


def _torchvision_first() -> None:
    """Declare the operators without which torchvision does not import beside another build of torch."""
    if not _OPERATORS:
        with contextlib.suppress(RuntimeError):  # torchvision's own build has declared them
            library = torch.library.Library("torchvision", "DEF")
            _OPERATORS.append(library)
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _timm(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    _torchvision_first()
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False), images(TIMM[name])


def _segmentation(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    _torchvision_first()
    models = pytest.importorskip("segmentation_models_pytorch")
    size = 128 if name in ("PAN", "PSPNet") else 64
    return getattr(models, name)("resnet18", encoder_weights=None, classes=2), images(size)


def _graph(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    models = pytest.importorskip("torch_geometric.nn")
    ring = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]])
    return getattr(models, name)(8, 16, 2, 3), (torch.randn(8, 8), ring)


def _encoder(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 10, 32),)


def _demo(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from lightning.pytorch.demos import transformer

    tokens = torch.randint(0, 99, (2, 16))
    return transformer.Transformer(vocab_size=99, ninp=32, nhead=2, nhid=32, nlayers=2), (tokens, tokens)


MODELS: list[tuple[Callable[[str], tuple[nn.Module, tuple[Any, ...]]], str]] = [
    *((_torchvision, name) for name in TORCHVISION),
    *((_timm, name) for name in TIMM),
    *((_segmentation, name) for name in SEGMENTATION),
    *((_graph, name) for name in GRAPHS),
    (_encoder, "TransformerEncoder"),
    (_demo, "Transformer"),
]


@pytest.mark.parametrize(("make", "name"), MODELS, ids=[f"{make.__name__[1:]}-{name}" for make, name in MODELS])
def test_a_foreign_model_loses_half_its_units_and_agrees_with_its_mask(make, name, capsys):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, inputs = make(name)
        module.eval()
        groups = channel_groups(module, inputs)
        units = {group.name: torch.randperm(len(group)) < max(1, round(len(group) / 2)) for group in groups}
        small = shrink(module, inputs, units, groups)
    report = report_of(small)
    kept = {name: int(units[name].sum()) for name in report.units}
    with capsys.disabled():
        share = report.params[1] / report.params[0]
        print(f"\n{name}: {len(report.units)} of {len(groups)} groups cut, {share:.2f} of the parameters kept")
        for group, why in report.refused.items():
            print(f"  {group} stayed whole: {why}")
    assert groups.report.faults == ()
    assert report.error < 1e-9
    assert CostModel(groups).params(kept) == count_parameters(small)
    probe = make_probe(module, groups.analysis.calls)
    reference, cut = copy.deepcopy(probe.module), report.plan.apply(probe.module).eval()
    mask_units(reference, list(groups), {n: torch.nonzero(~units[n]).ravel().tolist() for n in report.units})
    for call in probe.calls:
        expected, found = (call.run(m) for m in (reference, cut))
        if isinstance(expected, Tensor):
            assert float((expected - found).detach().abs().max() / expected.detach().abs().max()) < 1e-9
    small.train()
    output = small(*inputs)
    (output.sum() if isinstance(output, Tensor) else output[0].sum()).backward()
