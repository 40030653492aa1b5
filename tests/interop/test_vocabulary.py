"""Networks with other vocabularies: refused, or brought to the first one's entries."""

import json

import pytest
import torch

import clafusion
from clafusion import InputError
from clafusion.cli.app import main
from clafusion.interop.tokenizers import tokenised
from clafusion.interop.vocabulary import with_one_vocabulary
from clafusion.tracing.copies import copied
from tests.support.hugging_face import WORDS, directory, network, outputs, texts, tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning"),
    pytest.mark.filterwarnings("ignore::clafusion.AssessmentWarning"),
]

OTHERS = ["wolf", *WORDS[:4:-1], "owl", *WORDS[:4], "fox"]  # all but one, in another order
ALONE = WORDS.index("sees") + 3  # the entry of the first vocabulary that the second lacks


def in_other_words(model):
    """Return a copy of a network for the other vocabulary: what it computes is the same."""
    made = copied(model)
    known, wanted = tokenizer().get_vocab(), tokenizer(OTHERS).get_vocab()
    generator = torch.Generator().manual_seed(1)
    for table in {made.get_input_embeddings(), made.get_output_embeddings()} - {None}:
        rows = torch.randn(len(wanted), table.weight.size(1), generator=generator)
        for entry, number in wanted.items():
            if entry in known:
                rows[number] = table.weight[known[entry]].detach()
        table.weight = torch.nn.Parameter(rows)
    made.config.vocab_size = len(wanted)
    made.tie_weights()
    return made


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    return tmp_path


def pair(kind, place):
    model = network(kind, 2)
    directory(place / "a", model, tokenizer())
    directory(place / "b", in_other_words(model), tokenizer(OTHERS))
    return {name: clafusion.load(place / name) for name in "ab"}


def common(place):
    """Return tokens without the entry that one of the vocabularies lacks."""
    return tokenised([one.replace("sees", "runs") for one in texts()], place / "a")


@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "GPT-2 classifier", "T5"])
def test_a_network_in_other_words_is_the_network_itself(kind, place):
    models = pair(kind, place)
    data = common(place)
    if kind == "T5":
        data = [{**one, "decoder_input_ids": one["input_ids"][:, :3]} for one in data]
    with pytest.raises(InputError, match=r"have other vocabularies.* only 'a' has 'sees'"):
        clafusion.fuse(models, data)
    result = clafusion.fuse(models, data, vocabulary="intersection", calibration="none")
    inputs = {name: value[:6] for name, value in data[0].items()}
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 0] = ALONE  # which the second never saw
    torch.testing.assert_close(outputs(result.model, inputs), outputs(models["a"], inputs))
    assert result.model.config.vocab_size == len(tokenizer().get_vocab())
    assert models["b"].config.vocab_size == len(tokenizer(OTHERS).get_vocab())
    result.save("fused")
    found = transformers.AutoTokenizer.from_pretrained("fused")
    assert found.get_vocab() == tokenizer().get_vocab()


def test_the_command_takes_unlike_vocabularies(place, capsys):
    directory(place / "a", network("Llama", 2), tokenizer())
    directory(place / "b", network("Llama", 3, 1, words=len(OTHERS)), tokenizer(OTHERS))
    command = ["fuse", "a", "b", "--data=texts.jsonl", "--calibration=repair", "--out=fused"]
    assert main(command) == 2
    assert "--vocabulary intersection" in capsys.readouterr().err
    assert main([*command, "--vocabulary=intersection"]) == 0, capsys.readouterr().err
    fused = clafusion.load("fused")
    assert (fused.config.num_hidden_layers, fused.config.vocab_size) == (3, len(WORDS) + 3)
    found = transformers.AutoTokenizer.from_pretrained("fused")
    assert found.get_vocab() == tokenizer().get_vocab()
    for more, message in (
        (["--vocabulary=all"], "--vocabulary must be same or intersection"),
        (["--vocabulary=intersection", "--memory-limit=9GB"], "does not go with --memory-limit"),
    ):
        assert main([*command[:-1], "--out=more", *more]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_brought_together_is_refused(place):
    models = pair("GPT-2", place)
    data = common(place)
    with pytest.raises(InputError, match="vocabulary must be 'same' or 'intersection'; got 'any'"):
        clafusion.fuse(models, data, vocabulary="any")
    with pytest.raises(InputError, match="does not go with memory_limit: leave one out"):
        clafusion.fuse(models, data, vocabulary="intersection", memory_limit="9GB")
    with pytest.raises(InputError, match=r"every model's tokenizer.* models\['c'\] was not"):
        with_one_vocabulary({**models, "c": network("GPT-2", 1)}, "intersection")
    tokenizer(["x", "y"]).save_pretrained(place / "b")
    moved, own = with_one_vocabulary(models, "intersection")
    assert own.tolist() == list(range(3, len(WORDS) + 3))
    assert moved["a"] is models["a"]
    assert moved["b"] is not models["b"]


@pytest.mark.parametrize("call", [clafusion.fuse, clafusion.sweep])
def test_other_labels_are_refused_in_python_too(call):
    models = [network("DistilBERT", 1), network("DistilBERT", 1, 1)]
    models[1].config.id2label = {0: "good", 1: "bad", 2: "neither"}
    with pytest.raises(InputError, match="output 0 is 'bad' and 'good'"):
        call(models, [{"input_ids": torch.ones(60, 4, dtype=torch.long)}])


def test_tables_of_other_lengths_are_refused_by_their_numbers():
    models = [network("GPT-2", 2, seed) for seed in (0, 1)]
    models[1].resize_token_embeddings(32)
    tokens = [{"input_ids": torch.randint(3, 20, (60, 5))}]
    with pytest.raises(InputError, match=r"models\[1\] 32. Give all as many by .*\(32\)"):
        clafusion.fuse(models, tokens)
