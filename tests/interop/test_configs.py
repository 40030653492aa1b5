"""The config of a network is found from its shapes, whatever config it was built from."""

import pytest
import torch

from clafusion import InputError
from clafusion.interop.configs import config_of
from tests.support.hugging_face import network

pytest.importorskip("transformers")

KINDS = ["BERT", "DistilBERT", "GPT-2", "Llama", "Qwen2", "ViT", "T5", "Whisper"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_widths_and_heads_are_found(kind):
    layers = (3, 4) if kind in ("T5", "Whisper") else 3
    large = network(kind, layers, width=32, heads=4)
    wanted = large.config.to_dict()
    large.config = network(kind, 2, width=16, heads=2).config
    found = config_of(large).to_dict()
    changed = {name for name in {*wanted, *found} if wanted.get(name) != found.get(name)}
    assert changed <= {"architectures", "dtype", "pooler_output_size"}  # ViT's has no pooler
    assert found["architectures"] == [type(large).__name__]
    assert large.config.num_hidden_layers == 2


def test_layers_of_unlike_widths_have_no_config():
    model = network("BERT", 2)
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense = torch.nn.Linear(16, 20)
    layer.output.dense = torch.nn.Linear(20, 16)
    with pytest.raises(InputError, match=r"no config of BertForSequenceClassification .* differ"):
        config_of(model)
