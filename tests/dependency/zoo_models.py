"""84 models that nobody in this project wrote, with random weights, and one example input each.

Made by the factories of their libraries, by name alone; a library that is not installed skips its models:

    torchvision timm transformers segmentation-models-pytorch monai torch-geometric vit-pytorch x-transformers
    rtdl_revisiting_models
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...]]


def images(size: int = 64, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def tokens() -> Tensor:
    return torch.randint(0, 99, (2, 16))


class FirstOutput(nn.Module):
    """A model of transformers with its tensor output alone."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x, **self.arguments)
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


class EncoderDecoder(nn.Module):
    """An encoder and decoder that read the same tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, decoder_input_ids=x, use_cache=False).logits


class RecurrentClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def _torchvision(name: str, size: int = 64) -> Made:
    models = pytest.importorskip("torchvision.models")
    settings = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(**settings), images(size)


def _torchvision_segmentation(name: str) -> Made:
    models = pytest.importorskip("torchvision.models.segmentation")
    return getattr(models, name)(weights=None, weights_backbone=None), images()


def _torchvision_video(name: str) -> Made:
    models = pytest.importorskip("torchvision.models.video")
    return getattr(models, name)(), (torch.randn(1, 3, 8, 32, 32),)


def _timm(name: str, size: int = 64) -> Made:
    return pytest.importorskip("timm").create_model(name, pretrained=False), images(size)


def _segmentation(name: str, size: int = 64) -> Made:
    models = pytest.importorskip("segmentation_models_pytorch")
    return getattr(models, name)("resnet18", encoder_weights=None, classes=2), images(size)


_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (32, 32, 32), "conv_stride": (8, 8, 8), "conv_kernel": (8, 8, 8), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # name: configuration, its settings, arguments
    "BertModel": ("BertConfig", _TEXT, {}),
    "RobertaForSequenceClassification": ("RobertaConfig", _TEXT, {}),
    "DistilBertModel": (
        "DistilBertConfig", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, {},
    ),
    "GPT2LMHeadModel": (
        "GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"use_cache": False},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**_TEXT, "num_key_value_heads": 2}, {"use_cache": False}),
    "MixtralModel": (
        "MixtralConfig", {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 4}, {"use_cache": False},
    ),
    "MambaModel": (
        "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}, {"use_cache": False},
    ),
}  # fmt: skip
_VISION = {
    "ViTModel": ("ViTConfig", 32, {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    }),
    "SwinModel": ("SwinConfig", 32, {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4,
    }),
    "ConvNextV2Model": ("ConvNextV2Config", 64, {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}),
}  # fmt: skip


def _transformers(name: str) -> Made:
    library = pytest.importorskip("transformers")
    if name in _TRANSFORMERS:
        config, settings, arguments = _TRANSFORMERS[name]
        return FirstOutput(getattr(library, name)(getattr(library, config)(**settings)), **arguments), (tokens(),)
    if name in _VISION:
        config, size, settings = _VISION[name]
        return FirstOutput(getattr(library, name)(getattr(library, config)(**settings))), images(size)
    if name == "Wav2Vec2Model":
        return FirstOutput(library.Wav2Vec2Model(library.Wav2Vec2Config(**_SPEECH))), (torch.randn(2, 4096),)
    settings = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = library.T5Config(**settings, decoder_start_token_id=0)
    return EncoderDecoder(library.T5ForConditionalGeneration(config)), (tokens(),)


_MONAI: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {  # name: class, its settings, shape of the input
    "UNet2d": (
        "UNet", {"spatial_dims": 2, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}, (2, 1, 32, 32),
    ),
    "UNet3d": (
        "UNet", {"spatial_dims": 3, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}, (1, 1, 16, 16, 16),
    ),
    "SegResNet": ("SegResNet", {"spatial_dims": 2, "init_filters": 8}, (2, 1, 32, 32)),
    "DenseNet121": ("DenseNet121", {"spatial_dims": 2, "out_channels": 3}, (2, 1, 64, 64)),
    "AttentionUnet": (
        "AttentionUnet", {"spatial_dims": 2, "channels": (8, 16, 32), "strides": (2, 2)}, (2, 1, 32, 32),
    ),
    "DynUNet": (
        "DynUNet",
        {"spatial_dims": 2, "kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)},
        (2, 1, 32, 32),
    ),
    "UNETR": (
        "UNETR",
        {"img_size": (32, 32), "feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4, "spatial_dims": 2},
        (2, 1, 32, 32),
    ),
    "SwinUNETR": ("SwinUNETR", {"feature_size": 12, "spatial_dims": 2}, (2, 1, 64, 64)),
}  # fmt: skip


def _monai(name: str) -> Made:
    nets = pytest.importorskip("monai.networks.nets")
    kind, settings, shape = _MONAI[name]
    return getattr(nets, kind)(**{"in_channels": 1, "out_channels": 2, **settings}), (torch.randn(shape),)


def _graph(name: str) -> Made:
    models = pytest.importorskip("torch_geometric.nn")
    ring = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]])
    return getattr(models, name)(8, 16, 2, 3), (torch.randn(8, 8), ring)


def _vit_pytorch(name: str) -> Made:
    library = pytest.importorskip("vit_pytorch")
    model = getattr(library, name)(
        image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=4, mlp_dim=64, dim_head=8
    )
    return model, images(32)


def _x_transformers(name: str) -> Made:
    library = pytest.importorskip("x_transformers")
    layers = library.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return library.TransformerWrapper(num_tokens=99, max_seq_len=32, attn_layers=layers), (tokens(),)


def _tabular(name: str) -> Made:
    library = pytest.importorskip("rtdl_revisiting_models")
    if name == "ResNet":
        settings = {"n_blocks": 2, "d_block": 32, "d_hidden": None, "d_hidden_multiplier": 2.0}
        return library.ResNet(d_in=8, d_out=2, dropout1=0.0, dropout2=0.0, **settings), (torch.randn(4, 8),)
    settings = {"n_blocks": 2, "d_block": 32, "attention_n_heads": 4, "ffn_d_hidden_multiplier": 4 / 3}
    model = library.FTTransformer(
        n_cont_features=5, cat_cardinalities=[], d_out=2, attention_dropout=0.0, ffn_d_hidden=None, ffn_dropout=0.0,
        residual_dropout=0.0, **settings,
    )  # fmt: skip
    return model, (torch.randn(4, 5), None)


def _lightning(name: str) -> Made:
    if name == "BoringModel":
        from lightning.pytorch.demos.boring_classes import BoringModel

        return BoringModel(), (torch.randn(4, 32),)
    if name == "SimpleLSTM":
        from lightning.pytorch.demos.lstm import SimpleLSTM

        return SimpleLSTM(vocab_size=99), (tokens(), (torch.zeros(4, 2, 512), torch.zeros(4, 2, 512)))
    from lightning.pytorch.demos.transformer import Transformer

    return Transformer(vocab_size=99, ninp=32, nhead=2, nhid=32, nlayers=2), (tokens(), tokens())


def _torch(name: str) -> Made:
    if name == "LSTM":
        return RecurrentClassifier(), (torch.randn(2, 10, 8),)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 10, 32),)


# sizes of the input images that are not 64
_SIZES = {
    "vit_b_16": 224, "vit_tiny_patch16_224": 224, "mixer_s32_224": 224, "levit_128s": 224,
    "cait_xxs24_224": 224, "xcit_nano_12_p16_224": 224, "swinv2_cr_tiny_ns_224": 224,
}  # fmt: skip
_NAMES: dict[str, tuple[Callable[..., Made], str]] = {
    "torchvision": (_torchvision, """
        alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121
        googlenet shufflenet_v2_x0_5 squeezenet1_0 regnet_y_400mf convnext_tiny mnasnet0_5 vit_b_16 swin_t
    """),
    "torchvision.segmentation": (
        _torchvision_segmentation, "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large",
    ),
    "torchvision.video": (_torchvision_video, "r3d_18"),
    "timm": (_timm, """
        resnet10t vit_tiny_patch16_224 mobilenetv4_conv_small efficientvit_b0 mixer_s32_224 convmixer_768_32
        poolformer_s12 levit_128s ghostnet_050 lcnet_050 repvgg_a0 res2net50_26w_4s hrnet_w18_small dla34
        edgenext_xx_small cait_xxs24_224 mobilevit_xxs xcit_nano_12_p16_224 dm_nfnet_f0 swinv2_cr_tiny_ns_224
        fastvit_t8 caformer_s18
    """),
    "transformers": (_transformers, " ".join([*_TRANSFORMERS, *_VISION, "Wav2Vec2Model", "T5ForConditionalGeneration"])),
    "segmentation_models": (_segmentation, "Unet UnetPlusPlus FPN Linknet PSPNet DeepLabV3Plus MAnet PAN"),
    "monai": (_monai, " ".join(_MONAI)),
    "torch_geometric": (_graph, "GCN GraphSAGE GIN GAT"),
    "vit_pytorch": (_vit_pytorch, "ViT SimpleViT"),
    "x_transformers": (_x_transformers, "TransformerWrapper"),
    "rtdl": (_tabular, "FTTransformer ResNet"),
    "lightning": (_lightning, "BoringModel Transformer SimpleLSTM"),
    "torch": (_torch, "LSTM TransformerEncoder"),
}  # fmt: skip


def _made(make: Callable[..., Made], name: str) -> Callable[[], Made]:
    if name in ("PAN", "PSPNet"):
        return partial(make, name, size=128)
    return partial(make, name, size=_SIZES[name]) if name in _SIZES else partial(make, name)


MODELS: dict[str, Callable[[], Made]] = {
    f"{package}-{name}": _made(make, name)
    for package, (make, names) in _NAMES.items() for name in names.split()
}  # fmt: skip
