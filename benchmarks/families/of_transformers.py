"""Families of the transformers package: its classes, with small settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.family import Family, Inputs, images, tokens, values
from tests.support.architectures import randomise
from tests.support.transformers import OneOutput

__all__ = ["families"]

Named = dict[str, Tensor]


def _text() -> Named:
    return {"input_ids": tokens()}


def _both() -> Named:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(1)}


def _image() -> Named:
    return {"pixel_values": images()}


# Class of transformers -> the settings that depend on depth and width, and its inputs.
_Settings = Callable[[int, int], dict[str, Any]]
_USUAL = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert(d: int, w: int) -> dict[str, Any]:
    return {
        **_USUAL,
        "num_hidden_layers": 2 + d,
        "hidden_size": 16 * w,
        "num_attention_heads": 4 * w,
        "intermediate_size": 24 * w,
        "max_position_embeddings": 40,
        "embedding_size": 16,
    }


def _llama(d: int, w: int) -> dict[str, Any]:
    return {**_bert(d, w), "num_key_value_heads": 2 * w, "use_cache": False, "head_dim": 4}


def _gpt2(d: int, w: int) -> dict[str, Any]:
    heads = {"n_head": 4 * w, "n_layer": 2 + d, "n_embd": 16 * w, "n_positions": 40}
    return {**_USUAL, **heads, "use_cache": False}


def _encoder_decoder(d: int, w: int) -> dict[str, Any]:
    return {
        **_USUAL,
        "encoder_layers": 2 + d,
        "decoder_layers": 2 + d,
        "d_model": 16 * w,
        "encoder_attention_heads": 4 * w,
        "decoder_attention_heads": 4 * w,
        "encoder_ffn_dim": 24 * w,
        "decoder_ffn_dim": 24 * w,
        "max_position_embeddings": 40,
        "use_cache": False,
        "decoder_start_token_id": 1,
    }


def _vit(d: int, w: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": 2 + d,
        "hidden_size": 16 * w,
        "num_attention_heads": 4 * w,
        "intermediate_size": 24 * w,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
    }


def _swin(d: int, w: int) -> dict[str, Any]:
    return {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8 * w,
        "depths": [2, 2 + 2 * d],
        "num_heads": [2 * w, 4 * w],
        "window_size": 4,
        "num_labels": 5,
    }


_NETWORKS: dict[str, tuple[str, _Settings, Callable[[], Named]]] = {
    "BERT": ("BertForMaskedLM", _bert, _text),
    "BERT, classifier": ("BertForSequenceClassification", _bert, _text),
    "RoBERTa": ("RobertaForMaskedLM", _bert, _text),
    "XLM-RoBERTa": ("XLMRobertaForSequenceClassification", _bert, _text),
    "ELECTRA": ("ElectraForMaskedLM", lambda d, w: {**_bert(d, w), "embedding_size": 12}, _text),
    "ALBERT": ("AlbertForMaskedLM", _bert, _text),
    "MPNet": ("MPNetForMaskedLM", _bert, _text),
    "DeBERTa-v2": (
        "DebertaV2ForMaskedLM",
        lambda d, w: {
            **_bert(d, w),
            "embedding_size": 16 * w,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
        },
        _text,
    ),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        lambda d, w: {
            **_USUAL,
            "n_layers": 2 + d,
            "dim": 16 * w,
            "n_heads": 4 * w,
            "hidden_dim": 24 * w,
            "max_position_embeddings": 40,
        },
        _text,
    ),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        lambda d, w: {
            **_bert(d, w),
            "global_attn_every_n_layers": 2,
            "num_hidden_layers": 2 + 2 * d,
        },
        _text,
    ),
    "GPT-2": ("GPT2LMHeadModel", _gpt2, _text),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        lambda d, w: {
            **_USUAL,
            "num_layers": 2 + 2 * d,
            "hidden_size": 16 * w,
            "num_heads": 4 * w,
            "attention_types": [[["global", "local"], 1 + d]],
            "max_position_embeddings": 40,
            "use_cache": False,
        },
        _text,
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _bert, _text),
    "GPT-J": ("GPTJForCausalLM", lambda d, w: {**_gpt2(d, w), "rotary_dim": 2}, _text),
    "OPT": (
        "OPTForCausalLM",
        lambda d, w: {**_bert(d, w), "ffn_dim": 24 * w, "word_embed_proj_dim": 16 * w},
        _text,
    ),
    "BLOOM": (
        "BloomForCausalLM",
        lambda d, w: {**_USUAL, "n_layer": 2 + d, "hidden_size": 16 * w, "n_head": 4 * w},
        _text,
    ),
    "Falcon": (
        "FalconForCausalLM",
        lambda d, w: {**_bert(d, w), "new_decoder_architecture": False, "use_cache": False},
        _text,
    ),
    "Llama": ("LlamaForCausalLM", _llama, _text),
    "Mistral": ("MistralForCausalLM", _llama, _text),
    "Qwen2": ("Qwen2ForCausalLM", _llama, _text),
    "Qwen3": ("Qwen3ForCausalLM", _llama, _text),
    "Gemma": ("GemmaForCausalLM", _llama, _text),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        lambda d, w: {**_llama(d, w), "num_hidden_layers": 2 + 2 * d, "sliding_window": 6},
        _text,
    ),
    "Phi": ("PhiForCausalLM", _llama, _text),
    "Phi-3": ("Phi3ForCausalLM", _llama, _text),
    "StableLM": ("StableLmForCausalLM", _llama, _text),
    "OLMo 2": ("Olmo2ForCausalLM", _llama, _text),
    "Mixtral": (
        "MixtralForCausalLM",
        lambda d, w: {**_llama(d, w), "num_local_experts": 3, "num_experts_per_tok": 2},
        _text,
    ),
    "Mixtral, other numbers of experts": (
        "MixtralForCausalLM",
        lambda d, w: {**_llama(d, w), "num_local_experts": 3 * w, "num_experts_per_tok": 2 * w},
        _text,
    ),
    "Mamba": (
        "MambaForCausalLM",
        lambda d, w: {
            **_USUAL,
            "num_hidden_layers": 2 + d,
            "hidden_size": 16 * w,
            "state_size": 4,
            "time_step_rank": 2,
            "use_cache": False,
        },
        _text,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        lambda d, w: {
            **_USUAL,
            "num_layers": 2 + d,
            "num_decoder_layers": 2 + d,
            "d_model": 16 * w,
            "num_heads": 4 * w,
            "d_kv": 4,
            "d_ff": 24 * w,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        _both,
    ),
    "BART": ("BartForConditionalGeneration", _encoder_decoder, _both),
    "Marian": ("MarianMTModel", _encoder_decoder, _both),
    "Pegasus": ("PegasusForConditionalGeneration", _encoder_decoder, _both),
    "Whisper": (
        "WhisperForConditionalGeneration",
        lambda d, w: {
            **_encoder_decoder(d, w),
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 40,
        },
        lambda: {"input_features": values(16, 32), "decoder_input_ids": tokens(1)},
    ),
    "wav2vec 2.0": (
        "Wav2Vec2ForSequenceClassification",
        lambda d, w: {
            **_bert(d, w),
            "conv_dim": (8, 8),
            "conv_stride": (4, 2),
            "conv_kernel": (8, 3),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        lambda: {"input_values": values(160)},
    ),
    "ViT": ("ViTForImageClassification", _vit, _image),
    "DeiT": ("DeiTForImageClassification", _vit, _image),
    "DINOv2": ("Dinov2ForImageClassification", lambda d, w: {**_vit(d, w), "mlp_ratio": 2}, _image),
    "BEiT": ("BeitForImageClassification", _vit, _image),
    "CLIP, vision": ("CLIPVisionModelWithProjection", _vit, _image),
    "CLIP, text": (
        "CLIPTextModelWithProjection",
        lambda d, w: {**_bert(d, w), "projection_dim": 8},
        _text,
    ),
    "SigLIP, vision": (
        "SiglipForImageClassification",
        lambda d, w: {"vision_config": _vit(d, w), "num_labels": 5},
        _image,
    ),
    "Swin": ("SwinForImageClassification", _swin, _image),
    "Swin V2": ("Swinv2ForImageClassification", _swin, _image),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        lambda d, w: {"depths": [1, 1 + d], "hidden_sizes": [8 * w, 12 * w], "num_stages": 2},
        _image,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        lambda d, w: {
            "depths": [1 + d, 2],
            "hidden_sizes": [8 * w, 16 * w],
            "embedding_size": 8 * w,
            "layer_type": "basic",
        },
        _image,
    ),
    "RegNet": (
        "RegNetForImageClassification",
        lambda d, w: {
            "depths": [1 + d, 2],
            "hidden_sizes": [8 * w, 16 * w],
            "embedding_size": 8 * w,
            "groups_width": 4 * w,
        },
        _image,
    ),
    "PoolFormer": (
        "PoolFormerForImageClassification",
        lambda d, w: {
            "depths": [1 + d, 2],
            "hidden_sizes": [8 * w, 16 * w],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        _image,
    ),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        lambda d, w: {
            "num_encoder_blocks": 2,
            "depths": [1 + d, 2],
            "hidden_sizes": [8 * w, 16 * w],
            "num_attention_heads": [2 * w, 4 * w],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16 * w,
        },
        _image,
    ),
}


def _made(name: str, settings: _Settings, inputs: Callable[[], Named]) -> Any:
    def make(depth: int, width: int) -> tuple[nn.Module, Inputs]:
        library = importlib.import_module("transformers")
        kind = getattr(library, name)
        config = kind.config_class(**settings(depth, width))
        config._attn_implementation = "eager"
        torch.manual_seed(depth + 10 * width)
        given = inputs()
        model = randomise(kind(config), seed=depth + 10 * width)
        return OneOutput(model, *given).eval(), tuple(given.values())

    return make


def families() -> list[Family]:
    """Return the families; their networks import transformers when they are made."""
    return [Family("transformers", name, _made(*given)) for name, given in _NETWORKS.items()]
