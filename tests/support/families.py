"""Families of networks with several streams or blocks of other kinds, of any depth.

Those of the transformers package are tiny and return one tensor.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.architectures import randomise
from tests.support.transformers import OneOutput

VOCABULARY = 23


def tokens(length: int, seed: int = 1, rows: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def values(*shape: int, seed: int = 1, rows: int = 24) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


TEXT = (tokens(6),)
SHORT_TEXT = (tokens(3, rows=8),)
TEXTS = (tokens(6), tokens(4, seed=2))
SOUND = (values(8, 24), tokens(4, seed=2))
IMAGES = (values(3, 16, 16),)
VECTORS = (values(8),)


_SEQUENCES = ("input_ids", "decoder_input_ids")
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def _built(build, config, names: Sequence[str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(OneOutput(build(config), *names), seed)


def t5(encoder: int, decoder: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=20,
        num_heads=4,
        num_layers=encoder,
        num_decoder_layers=decoder,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return _built(transformers.T5ForConditionalGeneration, config, _SEQUENCES, seed)


def bart(encoder: int, decoder: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=16,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(transformers.BartForConditionalGeneration, config, _SEQUENCES, seed)


def whisper(encoder: int, decoder: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_source_positions=12,
        max_target_positions=16,
        use_cache=False,
        decoder_start_token_id=0,
        **_SPECIAL,
    )
    names = ("input_features", "decoder_input_ids")
    return _built(transformers.WhisperForConditionalGeneration, config, names, seed)


def _text_config(layers: int) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
    }


def bert(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.BertConfig(**_text_config(layers))
    return _built(transformers.BertForSequenceClassification, config, ("input_ids",), seed)


def albert(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.AlbertConfig(**_text_config(layers), embedding_size=8)
    return _built(transformers.AlbertForSequenceClassification, config, ("input_ids",), seed)


def gemma2(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.Gemma2Config(
        **_text_config(layers),
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=3,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(transformers.Gemma2ForCausalLM, config, ("input_ids",), seed)


def phi(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.PhiConfig(**_text_config(layers), use_cache=False)
    return _built(transformers.PhiForCausalLM, config, ("input_ids",), seed)


def gpt_neox(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.GPTNeoXConfig(**_text_config(layers), use_cache=False)
    return _built(transformers.GPTNeoXForCausalLM, config, ("input_ids",), seed)


def llama(layers: int, heads: int, keys: int, seed: int = 0) -> nn.Module:
    """Return a Llama with ``heads`` heads of queries and ``keys`` of keys and values, of size 4."""
    import transformers

    config = transformers.LlamaConfig(
        **{**_text_config(layers), "num_attention_heads": heads},
        num_key_value_heads=keys,
        head_dim=4,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(transformers.LlamaForCausalLM, config, ("input_ids",), seed)


def mixtral(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.MixtralConfig(
        **_text_config(layers),
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(transformers.MixtralForCausalLM, config, ("input_ids",), seed)


def stacked(kind: str, experts: int, chosen: int, seed: int = 0) -> nn.Module:
    """Return a language model of one layer with experts in one tensor, of which some take part."""
    import transformers

    counts = {
        "Mixtral": {"num_local_experts": experts},
        "Qwen3Moe": {"num_experts": experts, "moe_intermediate_size": 12, "head_dim": 4},
    }
    config = getattr(transformers, f"{kind}Config")(
        **_text_config(1),
        **counts[kind],
        num_key_value_heads=2,
        num_experts_per_tok=chosen,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(getattr(transformers, f"{kind}ForCausalLM"), config, ("input_ids",), seed)


def mamba(layers: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        state_size=4,
        time_step_rank=2,
        use_cache=False,
        **_SPECIAL,
    )
    return _built(transformers.MambaForCausalLM, config, ("input_ids",), seed)


class Experts(nn.Module):
    """A mixture whose experts are modules of a list; a router weighs them all."""

    def __init__(self, width: int, count: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        shares = self.router(read).softmax(-1)
        written = torch.stack([expert(read) for expert in self.experts], -2)
        return x + (written * shares.unsqueeze(-1)).sum(-2)


class Mixture(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 5)
        self.layers = nn.Sequential(*(Experts(16, 3, 12) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layers(self.enter(x)))


def mixture(layers: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Mixture(layers), seed)


def swin(*depths: int, seed: int = 0) -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=list(depths),
        num_heads=[2, 4][: len(depths)],
        window_size=2,
        mlp_ratio=2.0,
        num_labels=5,
    )
    return _built(transformers.SwinForImageClassification, config, ("pixel_values",), seed)


class Translator(nn.Module):
    """nn.Transformer between two embeddings and a linear layer."""

    def __init__(self, encoder: int, decoder: int, norm_first: bool) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, 16), nn.Embedding(VOCABULARY, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no nested tensors in pre-norm encoders
            self.transformer = nn.Transformer(
                16, 4, encoder, decoder, 20, 0.0, batch_first=True, norm_first=norm_first
            )
        self.out = nn.Linear(16, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.transformer(self.source(source), self.target(target)))


def translator(encoder: int, decoder: int, seed: int = 0, norm_first: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Translator(encoder, decoder, norm_first), seed)


class Detector(nn.Module):
    """Like DETR: a convolution, an encoder, and a decoder that starts from learnt queries."""

    def __init__(self, encoder: int, decoder: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )
        layer = nn.TransformerEncoderLayer(16, 4, 20, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, encoder, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 4, 20, 0.0, batch_first=True), decoder
        )
        self.queries = nn.Embedding(5, 16)
        self.classes, self.boxes = nn.Linear(16, 6), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(self.backbone(x).flatten(2).transpose(1, 2))
        queries = self.queries.weight.unsqueeze(0).expand(x.size(0), -1, -1)
        found = self.decoder(queries, memory)
        return torch.cat([self.classes(found), self.boxes(found).sigmoid()], -1)


def detector(encoder: int, decoder: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Detector(encoder, decoder), seed)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.norm(self.first(x))))


class UNet(nn.Module):
    """Two levels and a bottom, each of any number of residual blocks or convolutions.

    ``skips`` says how skips join: ``"cat"`` or ``"add"``.
    """

    def __init__(
        self, down: Sequence[int], bottom: int, up: Sequence[int], residual: bool, skips: str
    ) -> None:
        super().__init__()
        widths, self.skips = (6, 8, 10), skips

        def level(into: int, width: int, blocks: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Conv2d(into, width, 3, padding=1)]
            for _ in range(blocks):
                if residual:
                    layers.append(Residual(width))
                else:
                    norm = nn.BatchNorm2d(width)
                    layers += [norm, nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
            return nn.Sequential(*layers, nn.ReLU())

        times = 2 if skips == "cat" else 1
        self.down = nn.ModuleList(
            level(into, width, blocks)
            for into, width, blocks in zip((3, *widths), widths[:2], down, strict=False)
        )
        self.bottom = level(widths[1], widths[2], bottom)
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(into, width, 2, 2) for into, width in ((10, 8), (8, 6))
        )
        self.up = nn.ModuleList(
            level(times * width, width, blocks) for width, blocks in zip((8, 6), up, strict=True)
        )
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for widen, level in zip(self.widen, self.up, strict=True):
            x, skip = widen(x), kept.pop()
            x = level(x + skip if self.skips == "add" else torch.cat([x, skip], 1))
        return self.out(x)


def unet(
    down=(1, 1), bottom=1, up=(1, 1), seed: int = 0, residual: bool = True, skips: str = "cat"
) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(UNet(down, bottom, up, residual, skips), seed)
