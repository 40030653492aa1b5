"""Hugging Face directories of small networks, with a tokenizer, and texts."""

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


def network(kind: str, layers: int, seed: int = 0, width: int = 16) -> nn.Module:
    """Return a small network of transformers, with random weights that do something."""
    import transformers as library

    torch.manual_seed(seed)
    vocabulary, length = len(WORDS) + 3, 16
    if kind == "GPT-2":
        config = library.GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=2,
            bos_token_id=2, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = library.GPT2LMHeadModel(config)
    elif kind.startswith("Llama"):
        config = library.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=24,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=length,
            tie_word_embeddings=kind == "Llama, tied", bos_token_id=2, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        model = library.LlamaForCausalLM(config)
    elif kind == "DistilBERT":
        config = library.DistilBertConfig(
            vocab_size=vocabulary, dim=width, hidden_dim=width + 8, n_layers=layers, n_heads=2,
            max_position_embeddings=length, id2label={0: "bad", 1: "good", 2: "neither"},
            label2id={"bad": 0, "good": 1, "neither": 2},
        )  # fmt: skip
        model = library.DistilBertForSequenceClassification(config)
    elif kind == "BERT":
        config = library.BertConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width + 8,
            num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=length,
            num_labels=3,
        )  # fmt: skip
        model = library.BertForSequenceClassification(config)
    else:
        config = library.ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, image_size=16,
            intermediate_size=20, patch_size=8, num_labels=5,
        )  # fmt: skip
        model = library.ViTForImageClassification(config)
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
