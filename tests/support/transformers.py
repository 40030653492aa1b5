"""Small models that nobody here wrote."""

import torch
from torch import Tensor, nn


class OneOutput(nn.Module):
    """A model of transformers that takes positional inputs and returns the first of its outputs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        first: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[0]
        return first


def transformer(kind: str, layers: int, seed: int) -> nn.Module:
    """Return a small model that nobody here wrote, with random weights."""
    import transformers

    torch.manual_seed(seed)
    if kind == "ViT":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
        return transformers.ViTForImageClassification(config).eval()
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=16,
            n_layer=layers,
            n_head=2,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12],
        depths=[layers, 1],
        num_stages=2,
        patch_size=2,
        num_labels=5,
        layer_scale_init_value=0.5,
    )
    return transformers.ConvNextForImageClassification(config).eval()
