"""Families of the torchvision package: its classes, with small arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.families.family import Family, Inputs, images
from tests.support.architectures import randomise

__all__ = ["families"]

_CLASSES = 5


def _of(path: str) -> Any:
    """Return ``module.name`` of torchvision."""
    module, name = path.rsplit(".", 1)
    return getattr(import_module(f"torchvision.{module}"), name)


def _vgg(d: int, w: int) -> nn.Module:
    config = [8 * w, "M", *[12 * w] * (1 + d), "M", 16 * w, "M"]
    features = _of("models.vgg.make_layers")(config, batch_norm=True)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * w, _CLASSES))
    return nn.Sequential(features, head)


def _shufflenet(d: int, w: int) -> nn.Module:
    widths = [one * w for one in (8, 16, 24, 32, 32)]
    return _of("models.ShuffleNetV2")([2, 2 + d, 2], widths, num_classes=_CLASSES)


def _mobilenet_v2(d: int, w: int) -> nn.Module:
    setting = [[1, 8, 1, 1], [2, 12, 1 + d, 2], [2, 16, 1, 2]]
    return _of("models.MobileNetV2")(
        num_classes=_CLASSES,
        width_mult=float(w),
        inverted_residual_setting=setting,
        round_nearest=4,
    )


def _mobilenet_v3(d: int, w: int) -> nn.Module:
    block = partial(_of("models.mobilenetv3.InvertedResidualConfig"), dilation=1, width_mult=w)
    blocks = [
        block(8, 3, 8, 8, True, "RE", 1),
        block(8, 3, 16, 12, False, "RE", 2),
        *[block(12, 5, 24, 12, True, "HS", 1)] * d,
        block(12, 5, 24, 16, True, "HS", 2),
    ]
    return _of("models.MobileNetV3")(blocks, 24 * w, num_classes=_CLASSES)


def _efficientnet(d: int, w: int) -> nn.Module:
    block = partial(_of("models.efficientnet.MBConvConfig"), width_mult=w)
    setting = [block(1, 3, 1, 8, 8, 1), block(2, 3, 2, 8, 16, 1 + d), block(2, 5, 2, 16, 24, 1)]
    return _of("models.EfficientNet")(setting, 0.0, num_classes=_CLASSES, last_channel=24 * w)


def _regnet(d: int, w: int) -> nn.Module:
    block = _of("models.regnet.BlockParams")(
        depths=[1 + d, 1],
        widths=[8 * w, 16 * w],
        group_widths=[4 * w, 4 * w],
        bottleneck_multipliers=[1.0, 1.0],
        strides=[2, 2],
        se_ratio=0.25,
    )
    return _of("models.RegNet")(block, num_classes=_CLASSES, stem_width=8 * w)


def _convnext(d: int, w: int) -> nn.Module:
    block = _of("models.convnext.CNBlockConfig")
    setting = [block(8 * w, 12 * w, 1), block(12 * w, None, 1 + d)]
    return _of("models.ConvNeXt")(setting, num_classes=_CLASSES)


def _vit(d: int, w: int) -> nn.Module:
    return _of("models.VisionTransformer")(
        32, 8, 2 + d, 4 * w, 16 * w, 24 * w, num_classes=_CLASSES
    )


def _swin(d: int, w: int, second: bool = False) -> nn.Module:
    other = {
        "block": _of("models.swin_transformer.SwinTransformerBlockV2"),
        "downsample_layer": _of("models.swin_transformer.PatchMergingV2"),
    }
    return _of("models.SwinTransformer")(
        patch_size=[2, 2],
        embed_dim=8 * w,
        depths=[2, 2 + 2 * d],
        num_heads=[2 * w, 4 * w],
        window_size=[4, 4],
        mlp_ratio=2.0,
        num_classes=_CLASSES,
        **(other if second else {}),
    )


def _maxvit(d: int, w: int) -> nn.Module:
    return _of("models.MaxVit")(
        input_size=(32, 32),
        stem_channels=8 * w,
        partition_size=2,
        block_channels=[8 * w, 16 * w],
        block_layers=[1 + d, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        mlp_ratio=2,
        num_classes=_CLASSES,
    )


def _densenet(d: int, w: int) -> nn.Module:
    return _of("models.DenseNet")(
        growth_rate=4 * w,
        block_config=(2, 2 + d),
        num_init_features=8 * w,
        bn_size=2,
        num_classes=_CLASSES,
    )


def _features(d: int, w: int, **layers: int) -> nn.Module:
    """Return the features of an EfficientNet: those of the numbered layers, by name."""
    features = _efficientnet(d, w).features
    getter = _of("models._utils.IntermediateLayerGetter")
    return getter(features, {str(number): name for name, number in layers.items()})


def _fcn(d: int, w: int) -> nn.Module:
    head = _of("models.segmentation.fcn.FCNHead")(24 * w, _CLASSES)
    return _of("models.segmentation.FCN")(_features(d, w, out=4), head)


def _deeplab(d: int, w: int) -> nn.Module:
    pyramid = _of("models.segmentation.deeplabv3.ASPP")(24 * w, (1, 2, 3), 8 * w)
    head = nn.Sequential(pyramid, nn.Conv2d(8 * w, _CLASSES, 1))
    return _of("models.segmentation.DeepLabV3")(_features(d, w, out=4), head)


def _lraspp(d: int, w: int) -> nn.Module:
    backbone = _features(d, w, low=2, high=4)
    return _of("models.segmentation.LRASPP")(backbone, 16 * w, 24 * w, _CLASSES, 12 * w)


def _pyramid(d: int, w: int) -> nn.Module:
    backbone = _efficientnet(d, w).features
    levels = {"1": "fine", "2": "middle", "3": "coarse"}
    return _of("models.detection.backbone_utils.BackboneWithFPN")(
        backbone, levels, [8 * w, 16 * w, 24 * w], 12
    )


_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "VGG": _vgg,
    "ShuffleNetV2": _shufflenet,
    "MobileNetV2": _mobilenet_v2,
    "MobileNetV3": _mobilenet_v3,
    "EfficientNet": _efficientnet,
    "RegNet Y": _regnet,
    "ConvNeXt": _convnext,
    "ViT": _vit,
    "Swin": _swin,
    "Swin V2": partial(_swin, second=True),
    "MaxViT": _maxvit,
    "DenseNet": _densenet,
    "FCN": _fcn,
    "DeepLabV3": _deeplab,
    "LR-ASPP": _lraspp,
    "Feature pyramid": _pyramid,
}


def _made(network: Callable[[int, int], nn.Module]) -> Any:
    def make(depth: int, width: int) -> tuple[nn.Module, Inputs]:
        torch.manual_seed(depth + 10 * width)
        return randomise(network(depth, width), seed=depth + 10 * width).eval(), (images(),)

    return make


def families() -> list[Family]:
    """Return the families; their networks import torchvision when they are made."""
    return [Family("torchvision", name, _made(network)) for name, network in _NETWORKS.items()]
