"""Families of the timm package: its classes, with small arguments."""

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
_STAGES = (8, 12, 16, 16)  # channels


def _class(path: str) -> Any:
    """Return ``module.Class`` of timm.models."""
    module, name = path.split(".")
    return getattr(import_module(f"timm.models.{module}"), name)


def _convnext(d: int, w: int) -> nn.Module:
    widths = tuple(w * one for one in _STAGES)
    return _class("convnext.ConvNeXt")(depths=(1, 1 + d, 1, 1), dims=widths, num_classes=_CLASSES)


def _convnext_v2(d: int, w: int) -> nn.Module:
    widths = tuple(w * one for one in _STAGES)
    return _class("convnext.ConvNeXt")(
        depths=(1, 1 + d, 1, 1),
        dims=widths,
        num_classes=_CLASSES,
        use_grn=True,
        ls_init_value=None,
    )


def _regnet(d: int, w: int) -> nn.Module:
    config = _class("regnet.RegNetCfg")(
        depth=6 + d, w0=8 * w, wa=8.0 * w, wm=2.0, group_size=4 * w, stem_width=8 * w, se_ratio=0.25
    )
    return _class("regnet.RegNet")(config, num_classes=_CLASSES)


def _resnet(d: int, w: int, block: str = "BasicBlock") -> nn.Module:
    return _class("resnet.ResNet")(
        _class(f"resnet.{block}"),
        (1, 1 + d, 1, 1),
        num_classes=_CLASSES,
        stem_type="deep",
        stem_width=4 * w,
        channels=tuple(w * one for one in _STAGES),
    )


def _efficientnet(d: int, w: int, blocks: tuple[str, ...], activation: type[nn.Module]) -> Any:
    decode = _class("_efficientnet_builder.decode_arch_def")
    repeats = [one.replace("r1", f"r{1 + d}") if i == 1 else one for i, one in enumerate(blocks)]
    return _class("efficientnet.EfficientNet")(
        block_args=decode([[one] for one in repeats]),
        num_classes=_CLASSES,
        num_features=24 * w,
        stem_size=8 * w,
        fix_stem=True,
        act_layer=activation,
        round_chs_fn=lambda channels: channels * w,
    )


def _vit(d: int, w: int) -> nn.Module:
    return _class("vision_transformer.VisionTransformer")(
        img_size=32,
        patch_size=8,
        embed_dim=16 * w,
        depth=2 + d,
        num_heads=4 * w,
        mlp_ratio=2.0,
        num_classes=_CLASSES,
    )


def _swin(d: int, w: int, kind: str = "swin_transformer.SwinTransformer") -> nn.Module:
    return _class(kind)(
        img_size=32,
        patch_size=2,
        embed_dim=8 * w,
        depths=(2, 2 + 2 * d),
        num_heads=(2 * w, 4 * w),
        window_size=4,
        mlp_ratio=2.0,
        num_classes=_CLASSES,
    )


def _eva(d: int, w: int) -> nn.Module:
    return _class("eva.Eva")(
        img_size=32,
        patch_size=8,
        embed_dim=16 * w,
        depth=2 + d,
        num_heads=2 * w,
        qkv_fused=False,
        mlp_ratio=2.0,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        num_classes=_CLASSES,
    )


def _mixer(d: int, w: int) -> nn.Module:
    return _class("mlp_mixer.MlpMixer")(
        num_classes=_CLASSES, img_size=32, patch_size=8, num_blocks=2 + d, embed_dim=16 * w
    )


def _poolformer(d: int, w: int) -> nn.Module:
    return _class("metaformer.MetaFormer")(
        num_classes=_CLASSES,
        depths=(1, 1 + d, 1, 1),
        dims=tuple(w * one for one in _STAGES),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=_class("metaformer.GroupNorm1"),
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    )


def _mambaout(d: int, w: int) -> nn.Module:
    return _class("mambaout.MambaOut")(
        num_classes=_CLASSES,
        depths=(1, 1 + d, 1, 1),
        dims=tuple(w * one for one in _STAGES),
    )


def _levit(d: int, w: int) -> nn.Module:
    return _class("levit.Levit")(
        img_size=64,
        num_classes=_CLASSES,
        embed_dim=(16 * w, 16 * w),
        key_dim=4,
        depth=(1 + d, 1),
        num_heads=(2 * w, 2 * w),
    )


def _nfnet(d: int, w: int) -> nn.Module:
    config = _class("nfnet.NfCfg")(
        depths=(1, 1 + d, 1, 1),
        channels=tuple(w * one for one in (16, 16, 32, 32)),
        stem_type="3x3",
        stem_chs=8 * w,
        group_size=8 * w,
        num_features=24 * w,
        ch_div=8,
    )
    return _class("nfnet.NormFreeNet")(config, num_classes=_CLASSES)


def _bit(d: int, w: int) -> nn.Module:
    return _class("resnetv2.ResNetV2")(
        [1, 1 + d, 1, 1],
        channels=tuple(w * one for one in (16, 16, 32, 32)),
        num_classes=_CLASSES,
        stem_chs=8 * w,
        norm_layer=partial(_class("resnetv2.GroupNormAct"), num_groups=4),
    )


def _hrnet(d: int, w: int) -> nn.Module:
    def stage(branches: int, block: str, blocks: int) -> dict[str, Any]:
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block_type": block,
            "num_blocks": (blocks,) * branches,
            "num_channels": tuple(4 * w * 2**i for i in range(branches)),
            "fuse_method": "SUM",
        }

    config = {
        "stem_width": 8 * w,
        "stage1": stage(1, "BOTTLENECK", 1),
        "stage2": stage(2, "BASIC", 1 + d),
        "stage3": stage(3, "BASIC", 1),
        "stage4": stage(4, "BASIC", 1),
    }
    return _class("hrnet.HighResolutionNet")(config, num_classes=_CLASSES)


def _densenet(d: int, w: int) -> nn.Module:
    return _class("densenet.DenseNet")(
        growth_rate=4 * w, block_config=(2, 2 + d), num_classes=_CLASSES, bn_size=2
    )


_MOBILENET_V2 = ("ds_r1_k3_s1_c8", "ir_r1_k3_s2_e2_c12", "ir_r1_k3_s2_e2_c16")
_EFFICIENTNET = (
    "ds_r1_k3_s1_e1_c8_se0.25",
    "ir_r1_k3_s2_e2_c12_se0.25",
    "ir_r1_k5_s2_e2_c16_se0.25",
)

_NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "ConvNeXt": (_convnext, 64),
    "ConvNeXt V2": (_convnext_v2, 64),
    "RegNet Y": (_regnet, 64),
    "ResNet": (_resnet, 64),
    "ResNet, bottleneck blocks": (partial(_resnet, block="Bottleneck"), 64),
    "EfficientNet": (partial(_efficientnet, blocks=_EFFICIENTNET, activation=nn.SiLU), 32),
    "MobileNetV2": (partial(_efficientnet, blocks=_MOBILENET_V2, activation=nn.ReLU6), 32),
    "ViT": (_vit, 32),
    "Swin": (_swin, 32),
    "Swin V2": (partial(_swin, kind="swin_transformer_v2.SwinTransformerV2"), 32),
    "EVA-02": (_eva, 32),
    "MLP-Mixer": (_mixer, 32),
    "PoolFormer": (_poolformer, 64),
    "MambaOut": (_mambaout, 64),
    "LeViT": (_levit, 64),
    "NF-ResNet": (_nfnet, 64),
    "BiT": (_bit, 64),
    "HRNet": (_hrnet, 64),
    "DenseNet": (_densenet, 32),
}


def _made(network: Callable[[int, int], nn.Module], size: int) -> Any:
    def make(depth: int, width: int) -> tuple[nn.Module, Inputs]:
        torch.manual_seed(depth + 10 * width)
        model = randomise(network(depth, width), seed=depth + 10 * width)
        return model.eval(), (images(size),)

    return make


def families() -> list[Family]:
    """Return the families; their networks import timm when they are made."""
    return [Family("timm", name, _made(*given)) for name, given in _NETWORKS.items()]
