"""Hugging Face directories in, one out: it loads, computes the same, and says what it is."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clafusion
from clafusion import Deeper, InputError
from clafusion.cli.app import main
from clafusion.interop import saving
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.tokenizers import check_same_labels, tokenised
from clafusion.profiling.batches import num_rows
from tests.support.hugging_face import directory, network, outputs, texts, tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning"),
    pytest.mark.filterwarnings("ignore::clafusion.WidthWarning"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    return tmp_path


@pytest.fixture
def saved(monkeypatch):
    """Return a list of all results that are saved, in order."""
    results, save = [], saving.save_result

    def keep(result, *arguments, **options):
        results.append(result)
        return save(result, *arguments, **options)

    monkeypatch.setattr(saving, "save_result", keep)
    return results


def arrays(kind):
    """Return inputs of a network by name, of one that does not take texts alone."""
    generator = torch.Generator().manual_seed(0)

    def words(length):
        return torch.randint(3, 20, (60, length), generator=generator)

    if kind.startswith("ViT"):
        return {"pixel_values": torch.randn(60, 3, 16, 16, generator=generator)}
    if kind.startswith("Whisper"):
        sounds = torch.randn(60, 4, 16, generator=generator)
        return {"input_features": sounds, "decoder_input_ids": words(6)}
    more = {"decoder_input_ids": words(6)} if kind.startswith("T5") else {}
    return {"input_ids": words(8), **more}


PAIRS = [
    ("BERT", (4, 2), (16, 16), {}),
    ("DistilBERT", (3, 2), (16, 24), {}),
    ("RoBERTa", (3, 2), (16, 16), {}),
    ("GPT-2", (3, 2), (16, 24), {}),
    ("GPT-2 classifier", (3, 2), (24, 16), {}),
    ("Llama", (3, 2), (32, 32), {}),
    ("Llama, tied", (3, 2), (128, 128), {"max_shard_size": "1MB"}),
    ("Qwen2, tied", (3, 2), (32, 32), {}),
    ("ViT", (3, 2), (16, 24), {}),
    ("T5", ((2, 2), (1, 1)), (16, 16), {}),
    ("Whisper", ((2, 1), (1, 2)), (16, 16), {}),  # each is the deeper one somewhere
]
OWN_DATA = ("ViT", "Qwen2", "T5", "Whisper")  # no texts: their tokenizers are their own


@pytest.mark.parametrize(
    ("kind", "layers", "widths", "options"), PAIRS, ids=[one[0] for one in PAIRS]
)
def test_two_directories_become_one(kind, layers, widths, options, place, saved, capsys):
    for name, count, width, seed in zip("ab", layers, widths, (0, 1), strict=True):
        model = network(kind, count, seed, width, heads=width // 8)
        directory(place / name, model, None if kind == "Whisper" else tokenizer(), **options)
    has_arrays = kind.startswith(OWN_DATA)
    if has_arrays:
        inputs = arrays(kind)
        np.savez("data.npz", labels=np.arange(60), **{k: v.numpy() for k, v in inputs.items()})
    else:
        inputs = tokenised(texts(), place / "a")[0]
    data = "data.npz" if has_arrays else "texts.jsonl"
    command = ["fuse", "a", "b", f"--data={data}", "--out=fused", "--calibration=repair"]
    assert main(command) == 0, capsys.readouterr().err
    (result,) = saved
    fresh, info = type(result.model).from_pretrained("fused", output_loading_info=True)
    assert not any(info.values())
    inputs = {name: value[:4] for name, value in inputs.items()}
    torch.testing.assert_close(outputs(fresh, inputs), outputs(result.model, inputs))
    check_config(fresh.config, layers, clafusion.load("a").config)
    assert fresh.config.architectures == [type(fresh).__name__]
    assert num_ties(fresh) == num_ties(clafusion.load("a"))
    if kind != "Whisper":
        check_tokenizer()
    card = (place / "fused/README.md").read_text()
    assert f"clafusion fuse a b --data={data}" in card
    assert "| first | 0.5 | a | `" in card
    assert not [one for one in place.iterdir() if one.name.startswith(".")]


def num_ties(model):
    """Return how many names of parameters a network has more than parameters."""
    names = list(model.named_parameters(remove_duplicate=False))
    return len(names) - len(list(model.parameters()))


def check_config(config, layers, first):
    """Check that a config is that of the first parent, with as many layers as both have."""
    most = [max(one) for one in zip(*layers, strict=True)] if isinstance(layers[0], tuple) else []
    of_decoder = ("num_decoder_layers", "decoder_layers")
    known = [getattr(config, name) for name in of_decoder if hasattr(config, name)]
    counts = [config.num_hidden_layers, *known]
    assert counts == (most or [max(layers)])
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "id2label", "use_cache")
    for name in same:
        assert getattr(config, name, 0) == getattr(first, name, 0)


def check_tokenizer():
    """Check that the tokenizer is that of the first parent."""
    own, found = (transformers.AutoTokenizer.from_pretrained(one) for one in ("a", "fused"))
    assert found.get_vocab() == own.get_vocab() == tokenizer().get_vocab()
    assert found.chat_template == own.chat_template == tokenizer().chat_template
    assert found(texts())["input_ids"] == own(texts())["input_ids"]


def test_images_in_shards_and_half_precision(place):
    paths = [
        directory(place / name, network("ViT", n, seed).to(torch.bfloat16), max_shard_size="10KB")
        for name, n, seed in (("a", 3, 0), ("b", 2, 1))
    ]
    assert len(list(paths[0].glob("*.safetensors"))) > 1
    (place / "a/preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor"}'
    )
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.savez("images.npz", pixel_values=images.numpy(), labels=np.arange(60))
    command = ["fuse", "a", "b", "--data=images.npz", "--out=fused", "--calibration=none"]
    assert main(command) == 0
    parents = [clafusion.load(one) for one in paths]
    assert parents[0].dtype == torch.bfloat16
    data = [{"pixel_values": one} for one in images.split(64)]
    result = clafusion.fuse(parents, data, calibration="none")
    result.save("again", max_shard_size="10KB", processor_of="models[0]")
    assert len(list((place / "again").glob("*.safetensors"))) > 1
    for name in ("fused", "again"):
        fresh = transformers.ViTForImageClassification.from_pretrained(name)
        assert fresh.dtype == fresh.config.dtype == torch.bfloat16
        for one, other in zip(fresh.parameters(), result.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert (place / name / "preprocessor_config.json").is_file()


def test_a_config_says_other_widths_heads_and_depths(place):
    for name, width, seed in (("a", 16, 0), ("b", 24, 1)):
        directory(place / name, network("DistilBERT", 2, seed, width), tokenizer())
    parents = [clafusion.load(place / name) for name in "ab"]
    data = tokenised(texts(), place / "a")
    result = clafusion.fuse(parents, data, target=Deeper(width="wide"), calibration="none")
    result.save("fused", dtype="bfloat16")
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained("fused")
    assert fresh.dtype == torch.bfloat16
    assert (fresh.config.dim, fresh.config.hidden_dim) == (24, 32)
    assert parents[0].config.dim == 16
    assert fresh.config.id2label == {0: "bad", 1: "good", 2: "neither"}
    assert result.model.dtype == torch.float32


# --- what is refused ----------------------------------------------------------------------------


def edited(path, **changes):
    file = path / "config.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **changes}))


BROKEN = [
    (lambda d: (d / "config.json").unlink(), "is no Hugging Face directory: it has no config.json"),
    (lambda d: (d / "model.safetensors").unlink(), "has no weights: none of model.safetensors"),
    (lambda d: edited(d, auto_map={"AutoModel": "x.Y"}), "trust_remote_code is never switched on"),
    (lambda d: edited(d, quantization_config={"bits": 4}), "has quantised weights"),
    (lambda d: edited(d, architectures=None), "names no architecture"),
    (lambda d: edited(d, architectures=["NoSuchNet"]), "transformers .* does not have"),
    (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "config.json").write_text("[]"), "must hold a mapping; it holds a list"),
    (lambda d: edited(d, architectures=["GPT2ForSequenceClassification"]), "lacks weights of GPT2"),
    (lambda d: edited(d, n_embd=32), "cannot be read"),
    (lambda d: edited(d, n_head=3), "cannot be read"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_directory_is_refused(change, message, tmp_path):
    path = directory(tmp_path / "a", network("GPT-2", 1))
    change(path)
    with pytest.raises(InputError, match=message):
        clafusion.load(path)


def test_weights_without_a_place_are_told(tmp_path):
    path = directory(tmp_path / "a", network("GPT-2", 1))
    edited(path, architectures=["GPT2LMHeadModel"], n_layer=0)
    with pytest.warns(clafusion.FusionWarning, match="left out: transformer.h.0"):
        clafusion.load(path)


def test_what_is_no_model_is_refused(tmp_path):
    for spec, message in (
        ("bert-base-uncased", "is not there: give a Hugging Face directory.*Nothing is downloaded"),
        ("timm:resnet18", "is an architecture without weights"),
    ):
        with pytest.raises(InputError, match=message):
            clafusion.load(spec)
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    for library in ("timm", "torchvision"):
        if find_spec(library) is None:
            with pytest.raises(InputError, match=f"there is no module '{library}"):
                clafusion.load(f"{library}:resnet18", tmp_path / "w.pt")
    with pytest.raises(InputError, match="is a file, whose architecture is unknown"):
        clafusion.load(tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds its own weights"):
        clafusion.load(tmp_path, tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of how torch copies an exported graph
def test_an_exported_program_is_a_model(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(net, (torch.randn(5, 6),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    rows = torch.randn(60, 6)
    loaded = clafusion.load(tmp_path / "net.pt2")
    result = clafusion.fuse([loaded, net], rows, calibration="none")
    torch.testing.assert_close(result.model(rows), net(rows))
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"is no program that torch.export.save wrote"):
        clafusion.load(tmp_path / "bad.pt2")
    with pytest.raises(InputError, match="does not exist"):
        clafusion.load(tmp_path / "none.pt2")
    with pytest.raises(InputError, match="holds its own weights: leave out key"):
        clafusion.load(tmp_path / "net.pt2", key="ema")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_programs_are_models_of_commands(place, capsys):
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim.AUTO},)
    for name in "ab":
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        program = torch.export.export(net, (torch.randn(5, 6),), dynamic_shapes=shapes)
        torch.export.save(program, place / f"{name}.pt2")
    np.save("rows.npy", np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32))
    command = ["fuse", "a.pt2", "b.pt2", "--data=rows.npy"]
    assert main([*command, "--out=fused.safetensors"]) == 0, capsys.readouterr().err
    assert "weights of fused.pt2" in capsys.readouterr().out
    model = clafusion.load("a.pt2")
    model.load_state_dict(load_file("fused.safetensors"))
    assert main(["inspect", "a.pt2", "--data=rows.npy"]) == 0
    manifest = {"models": {"a": "a.pt2", "b": "b.pt2"}, "data": "rows.npy", "out": "pairs"}
    (place / "pairs.json").write_text(json.dumps(manifest))
    assert main(["fuse-pairs", "pairs.json"]) == 0, capsys.readouterr()
    for arguments, message in (
        ([*command, "--out=f.pt", "--arch=x.py:y"], "say themselves what they are"),
        (["inspect", "a.pt2", "--data=rows.npy", "--arch=x.py:y"], "leave --arch out"),
        (["fuse", "a.pt2", "c.pt2", "--data=rows.npy", "--out=f.pt"], "'c.pt2' does not exist"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_directories_within_a_limit_of_memory_are_mapped(place, capsys):
    for name, layers in (("a", 2), ("b", 1)):
        directory(place / name, network("Llama, tied", layers), tokenizer())
    opened, mapped = ModelDirectory("a", "a").open()
    assert mapped == set(dict(opened.named_parameters()))
    directory(place / "halves", network("Llama, tied", 2), max_shard_size="10KB")
    assert ModelDirectory("halves", "halves").open()[1] == mapped
    assert num_ties(opened) == num_ties(clafusion.load("a"))
    command = ["fuse", "a", "b", "--data=texts.jsonl", "--calibration=repair"]
    assert main([*command, "--out=plain"]) == 0, capsys.readouterr().err
    assert main([*command, "--out=limited", "--memory-limit=20GB"]) == 0, capsys.readouterr().err
    plain, limited = (load_file(f"{one}/model.safetensors") for one in ("plain", "limited"))
    assert all(torch.equal(value, limited[name]) for name, value in plain.items())


def test_unlike_vocabularies_and_labels_are_refused(place, capsys):
    directory(place / "a", network("DistilBERT", 2), tokenizer())
    directory(place / "b", network("DistilBERT", 2, 1), tokenizer())
    from tests.support.hugging_face import WORDS

    other = [*WORDS[:2], "cow", *WORDS[3:-2], WORDS[-1], WORDS[-2]]
    tokenizer(other).save_pretrained(place / "b")
    command = ["fuse", "a", "b", "--data=texts.jsonl", "--out=fused"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "23 and 23 entries; only 'first' has 'cat'; only 'second' has 'cow'" in told
    assert "'they' is 21 and 22" in told
    tokenizer().save_pretrained(place / "b")
    edited(place / "b", id2label={"0": "good", "1": "bad", "2": "neither"})
    assert main(command) == 2
    assert "output 0 is 'bad' and 'good' (id2label" in capsys.readouterr().err
    assert not (place / "fused").exists()


def test_a_full_directory_stays_as_it_is(place, capsys):
    for name in "ab":
        directory(place / name, network("GPT-2", 1), tokenizer())
    (place / "fused").mkdir()
    (place / "fused/mine").write_text("x")
    command = ["fuse", "a", "b", "--data=texts.jsonl"]
    assert main([*command, "--out=fused"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [one.name for one in (place / "fused").iterdir()] == ["mine"]
    for more, message in (
        (["--out=fused/mine"], "is a file"),
        (["--out=none/fused"], "does not exist; create it"),
        (["--out=new", "--arch=x.py:y"], "leave --arch x.py:y out"),
        (["--out=new", "--processor-of=third"], "is none of the models, first, second"),
        (["--out=new.pt", "--processor-of=first"], "is for a directory"),
        (["--out=new", "--text-column=body"], "has no column 'body'; it has text"),
        (["--out=new", "--max-length=0"], "--max-length must be at least 1"),
        (["--out=new", "--scale=2"], "--scale does not fit the data 'texts.jsonl'"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_what_does_not_come_back_leaves_nothing_behind(place, monkeypatch):
    for name in "ab":
        directory(place / name, network("GPT-2", 1), tokenizer())
    parents = [clafusion.load(place / name) for name in "ab"]
    result = clafusion.fuse(parents, tokenised(texts(), place / "a"), calibration="none")
    with pytest.raises(InputError, match="is no parent; the parents are models"):
        result.save("fused", processor_of="a")
    read = transformers.GPT2LMHeadModel.from_pretrained.__func__

    def spoilt(*arguments, **options):
        model, info = read(*arguments, **options)
        with torch.no_grad():
            model.transformer.wte.weight[0] += 1
        return model, info

    kind = transformers.GPT2LMHeadModel
    monkeypatch.setattr(kind, "from_pretrained", classmethod(spoilt))
    with pytest.raises(InputError, match=r"transformer.wte.weight.* differ after loading"):
        result.save("fused")
    assert sorted(one.name for one in place.iterdir()) == ["a", "b", "texts.jsonl"]
    shutil.rmtree(place / "a")
    with pytest.raises(InputError, match="was not read from a directory that is still there"):
        result.save("fused", processor_of="models[0]")


def test_a_network_of_no_library_becomes_a_file(tmp_path):
    nets = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))]
    result = clafusion.fuse(nets * 2, torch.randn(60, 4), calibration="none")
    with pytest.raises(InputError, match=r"is no network of transformers: give a file \(.safetens"):
        result.save(tmp_path / "fused")
    result.save(tmp_path / "fused.pt")
    assert torch.load(tmp_path / "fused.pt").keys() == result.model.state_dict().keys()
    with pytest.raises(InputError, match="is for a directory"):
        result.save(tmp_path / "fused.pt", processor_of="x")


def test_a_directory_is_a_model_file(tmp_path):
    path = directory(tmp_path / "a", network("GPT-2", 1))
    file = ModelDirectory(str(path), path)
    file.check()
    before = file.digest()
    assert type(file.build()) is type(file.load())
    directory(path, network("GPT-2", 1, seed=1))
    assert file.digest() != before


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of how peft looks at a network
def test_an_adapter_is_merged(tmp_path, saved):
    peft = pytest.importorskip("peft")
    path = directory(tmp_path / "a", network("Llama", 2))
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(clafusion.load(path), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.save_pretrained(path)
    inputs = {"input_ids": torch.randint(3, 20, (4, 8))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for one in ("a", "adapter"):
        loaded = clafusion.load(tmp_path / one)
        assert type(loaded).__name__ == "LlamaForCausalLM"
        torch.testing.assert_close(outputs(loaded, inputs), outputs(adapted.eval(), inputs))
    directory(tmp_path / "b", network("Llama", 1, seed=1), tokenizer())
    tokenizer().save_pretrained(path)
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    given = [str(tmp_path / one) for one in ("a", "b", "texts.txt", "fused")]
    command = ["fuse", *given[:2], f"--data={given[2]}", "--calibration=repair"]
    assert main([*command, f"--out={given[3]}"]) == 0
    (result,) = saved
    fresh = transformers.LlamaForCausalLM.from_pretrained(given[3])
    torch.testing.assert_close(outputs(fresh, inputs), outputs(result.model, inputs))
    assert not list((tmp_path / "fused").glob("adapter*"))


def test_an_adapter_needs_its_base_and_its_library(tmp_path, monkeypatch):
    path = directory(tmp_path / "a", network("GPT-2", 1))
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "gone/base"}')
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match="merging it needs the library peft: install peft"):
        clafusion.load(path)
    (path / "config.json").unlink()
    with pytest.raises(InputError, match="an adapter without its base, 'gone/base'"):
        clafusion.load(path)


# --- other commands -----------------------------------------------------------------------------


def test_other_commands_take_directories(place, capsys):
    for name, layers in (("a", 2), ("b", 1)):
        directory(place / name, network("GPT-2", layers), tokenizer())
    assert main(["inspect", "a", "--data=texts.jsonl"]) == 0
    assert "transformer.h.1" in capsys.readouterr().out
    assert main(["explain", "a", "b", "--data=texts.jsonl"]) == 0
    assert "they can be fused" in capsys.readouterr().out
    assert main(["align", "one=a", "two=b", "--data=texts.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "one"
    for command, message in (
        (["inspect", "a", "--data=texts.jsonl", "--arch=x.py:y"], "leave --arch out"),
        (["inspect", "--data=texts.jsonl"], "give what makes the model, --arch MODULE:FACTORY"),
        (["align", "a", "w.pt", "--data=texts.jsonl"], "'w.pt' is no directory: give what makes"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_a_manifest_names_directories(place, capsys):
    for name, layers in (("a", 2), ("b", 1)):
        directory(place / name, network("GPT-2", layers), tokenizer())
    manifest = {
        "models": {"one": "a", "two": "b"},
        "data": {"file": "texts.jsonl", "text_column": "text", "max_length": 8},
        "settings": {"calibration": "none"},
        "out": "fused",
    }
    (place / "pairs.json").write_text(json.dumps(manifest))
    assert main(["fuse-pairs", "pairs.json"]) == 0, capsys.readouterr()
    fused = clafusion.load("fused/one+two")
    assert fused.config.n_layer == 2
    found = transformers.AutoTokenizer.from_pretrained("fused/one+two")
    assert found.get_vocab() == tokenizer().get_vocab()
    assert "# one and two, fused" in (place / "fused/one+two/README.md").read_text()
    capsys.readouterr()
    assert main(["fuse-pairs", "pairs.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 1
    weights = place / "fused/one+two/model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()  # the library maps what it has loaded
    weights.write_bytes(whole[:-1])
    assert main(["fuse-pairs", "pairs.json"]) == 0, capsys.readouterr()
    assert weights.read_bytes() == whole
    data = tokenised(texts(), place / "a", 8)
    files = {name: ModelDirectory(one, one) for name, one in manifest["models"].items()}
    (result,) = clafusion.fuse_pairs(files, data, calibration="none", out_dir="more")
    assert result.path.name == "one+two"
    state = fused.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.state.items())
    assert type(result.model) is type(fused)
    manifest["data"]["scale"] = 2
    (place / "pairs.json").write_text(json.dumps(manifest))
    assert main(["fuse-pairs", "pairs.json"]) == 2
    assert "data, scale does not fit the data" in capsys.readouterr().err
    (place / "b/config.json").unlink()
    assert main(["fuse-pairs", "pairs.json"]) == 2
    assert "models, two: 'b' is no Hugging Face directory" in capsys.readouterr().err.replace(
        f"{place}/", ""
    )


def test_texts_need_a_tokenizer(place, capsys):
    for name in "ab":
        directory(place / name, network("GPT-2", 1))
    command = ["fuse", "a", "b", "--data=texts.jsonl", "--out=fused"]
    assert main(command) == 2
    assert "'a' has no tokenizer (none of tokenizer.json" in capsys.readouterr().err
    command = ["fuse", "x.pt", "y.pt", "--arch=x.py:y", "--data=texts.jsonl", "--out=fused.pt"]
    assert main(command) == 2
    assert "a tokenizer is known of Hugging Face directories only" in capsys.readouterr().err


def test_a_mapping_of_tokens_with_labels_is_data():
    parents = [network("DistilBERT", 2), network("DistilBERT", 2, seed=1)]
    tokens = torch.randint(3, 20, (60, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.long)
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}]
    result = clafusion.fuse(parents, batches, calibration="none")
    assert outputs(result.model, {"input_ids": tokens}).shape == (60, 3)
    assert result.assessment.kind == "classes"


def test_weights_of_a_directory_are_no_place_for_the_result(place, capsys):
    for name in "ab":
        directory(place / name, network("GPT-2", 2), tokenizer())
    before = (place / "a" / "model.safetensors").read_bytes()
    command = ["fuse", "a", "b", "--data=texts.jsonl", "--out=a/model.safetensors"]
    assert main(command) == 2
    assert "is an input, which would be lost" in capsys.readouterr().err
    assert (place / "a" / "model.safetensors").read_bytes() == before


def test_what_a_tokenizer_returns_is_held_out_and_counted():
    data = [transformers.BatchEncoding(one) for one in padded_texts(600)]
    assert num_rows(data) == 600
    parents = [network("GPT-2", 2, seed) for seed in (0, 1)]
    assert clafusion.estimate(parents, data).num_inputs == 540
    found = clafusion.fuse(parents, data, calibration="repair")
    assert found.assessment.held_out


def padded_texts(count):
    """Return batches of tokens with a mask, as dictionaries."""
    tokens = torch.randint(3, 23, (count, 5), generator=torch.Generator().manual_seed(0))
    named = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return [{k: v[i : i + 100] for k, v in named.items()} for i in range(0, count, 100)]


def test_a_pointer_in_place_of_weights_is_recognised(place):
    directory(place / "a", network("GPT-2", 2), tokenizer())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (place / "a" / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        clafusion.load(place / "a")


def test_models_for_other_problems_are_refused():
    kinds = ("regression", "single_label_classification")
    configs = {name: {"problem_type": kind} for name, kind in zip("ab", kinds, strict=True)}
    with pytest.raises(InputError, match=r"other problems .* 'regression'"):
        check_same_labels({**configs, "c": {}})
