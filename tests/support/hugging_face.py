"""Hugging Face directories of small networks, with a tokenizer, and texts."""

from typing import Any

import torch
from torch import nn

WORDS = "the a cat dog sees runs sleeps good bad film is was not very and he she it they we".split()


def tokenizer(words=WORDS):
    """Return a tokenizer that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def texts(count=80, seed=0):
    """Return sentences of three to nine words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(most, (), generator=generator))

    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(3 + draw(7))) for _ in range(count)]


def network(
    kind: str,
    layers: int | tuple[int, int],
    seed: int = 0,
    width: int = 16,
    heads: int = 2,
    words: int = len(WORDS),
) -> nn.Module:
    """Return a small network of transformers, with random weights that do something.

    ``layers`` may be two numbers, of an encoder and of a decoder.
    """
    import transformers as library

    encoder, decoder = layers if isinstance(layers, tuple) else (layers, layers)
    torch.manual_seed(seed)
    vocabulary, length, ends = words + 3, 16, {"pad_token_id": 0, "eos_token_id": 2}
    of_stack: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width + 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    of_texts = {"vocab_size": vocabulary, "max_position_embeddings": length, **of_stack}
    labels = {"id2label": {0: "bad", 1: "good", 2: "neither"}}
    labels["label2id"] = {text: i for i, text in labels["id2label"].items()}
    if kind.startswith("GPT-2"):
        config = library.GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
            bos_token_id=2, **ends, **labels if "classifier" in kind else {},
        )  # fmt: skip
        head = "ForSequenceClassification" if "classifier" in kind else "LMHeadModel"
        model = getattr(library, f"GPT2{head}")(config)
    elif kind.startswith(("Llama", "Qwen2")):
        name = kind.partition(",")[0]
        config = getattr(library, f"{name}Config")(
            **of_texts, num_key_value_heads=heads // 2, tie_word_embeddings="tied" in kind,
            bos_token_id=2, **ends,
        )  # fmt: skip
        model = getattr(library, f"{name}ForCausalLM")(config)
    elif kind == "DistilBERT":
        config = library.DistilBertConfig(
            vocab_size=vocabulary, dim=width, hidden_dim=width + 8, n_layers=layers, n_heads=heads,
            max_position_embeddings=length, **labels,
        )  # fmt: skip
        model = library.DistilBertForSequenceClassification(config)
    elif kind == "BERT":
        model = library.BertForSequenceClassification(library.BertConfig(**of_texts, **labels))
    elif kind == "RoBERTa":
        more = {**of_texts, "max_position_embeddings": length + 2, "type_vocab_size": 1}
        model = library.RobertaForMaskedLM(library.RobertaConfig(**more, **ends))
    elif kind == "ViT":
        config = library.ViTConfig(**of_stack, image_size=16, patch_size=8, num_labels=5)
        model = library.ViTForImageClassification(config)
    elif kind == "T5":
        config = library.T5Config(
            vocab_size=vocabulary, d_model=width, d_ff=width + 8, d_kv=width // heads,
            num_layers=encoder, num_decoder_layers=decoder, num_heads=heads,
            decoder_start_token_id=0, **ends,
        )  # fmt: skip
        model = library.T5ForConditionalGeneration(config)
    else:
        config = library.WhisperConfig(
            vocab_size=vocabulary, d_model=width, encoder_layers=encoder, decoder_layers=decoder,
            encoder_attention_heads=heads, decoder_attention_heads=heads, num_mel_bins=4,
            encoder_ffn_dim=width + 8, decoder_ffn_dim=width + 8, max_source_positions=8,
            max_target_positions=length, bos_token_id=2, decoder_start_token_id=2, **ends,
        )  # fmt: skip
        model = library.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn(one.shape))
    return model.eval()


def directory(path, model, known=None, **options):
    """Write a network and a tokenizer as a Hugging Face directory; return the path."""
    model.save_pretrained(str(path), **options)
    if known is not None:
        known.save_pretrained(str(path))
    return path


def outputs(model, inputs):
    """Return a network's logits."""
    with torch.no_grad():
        return model(**inputs).logits
