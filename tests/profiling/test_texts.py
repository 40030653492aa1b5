"""Files of texts: what is read, and what is refused."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clafusion import InputError
from clafusion.profiling.samples import load_named_samples
from clafusion.profiling.texts import read_texts


@pytest.fixture
def write(tmp_path):
    def written(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


def test_texts_are_read(write):
    assert read_texts(write("a.txt", "one\n\ntwo\r\nthree")) == ["one", "two", "three"]
    lines = [{"id": 1, "sentence": "eins"}, {"id": 2, "sentence": "zwei"}]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_texts(path) == ["eins", "zwei"]
    assert read_texts(path, limit=1) == ["eins"]
    assert read_texts(write("b.jsonl", '"one"\n"two"\n')) == ["one", "two"]
    table = write("a.csv", 'text,other\n"one, and",x\ntwo,y\n')
    assert read_texts(table) == ["one, and", "two"]
    assert read_texts(table, "other") == ["x", "y"]
    assert read_texts(write("c.csv", "review\ngood\n")) == ["good"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.txt", "x", "text", "has lines and no columns"),
        ("a.txt", "\n \n", None, "holds no text"),
        ("a.jsonl", "{", None, "line 1 is no JSON"),
        ("a.jsonl", "[1]", None, "line 1 must be a mapping or a text; got list"),
        ("a.jsonl", '{"text": 3}', None, "row 1: 'text' holds a int, no text"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', None, "row 2: 'text' holds nothing"),
        ("a.jsonl", '{"a": "x", "b": "y"}', None, "has the columns a, b: say which"),
        ("a.csv", "a,b\nx,y\n", "c", "has no column 'c'; it has a, b"),
        ("a.doc", "x", None, "has an unknown ending; known are .txt"),
    ],
)
def test_what_is_no_text_is_refused(name, text, column, message, write):
    with pytest.raises(InputError, match=message):
        read_texts(write(name, text), column)


def test_another_encoding_and_no_limit_are_refused(tmp_path, write):
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read: UnicodeDecodeError"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(InputError, match="limit must be at least 1; got 0"):
        read_texts(write("b.txt", "x"), limit=0)


def test_parquet_needs_its_library(write):
    path = write("a.parquet", "PAR1")
    if find_spec("pyarrow") is None:
        with pytest.raises(InputError, match="needs the library pyarrow: install it"):
            read_texts(path)
        return
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "label": [0, 1]}), path)
    assert read_texts(path) == ["one", "two"]


def test_inputs_are_read_by_name(tmp_path):
    arrays = {
        "input_ids": np.arange(12, dtype=np.int32).reshape(4, 3),
        "attention_mask": np.ones((4, 3), dtype=np.int64),
        "labels": np.zeros(4),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.pt", "a.safetensors"):
        found = load_named_samples(tmp_path / name, ("input_ids", "attention_mask"), 3)
        assert sorted(found) == ["attention_mask", "input_ids"]
        assert found["input_ids"].dtype == torch.int64
        assert found["input_ids"].shape == (3, 3)
    np.savez(tmp_path / "b.npz", input_ids=arrays["input_ids"], attention_mask=np.ones((2, 3)))
    with pytest.raises(InputError, match="input_ids has 4, attention_mask has 2"):
        load_named_samples(tmp_path / "b.npz", ("input_ids", "attention_mask"))
    np.save(tmp_path / "c.npy", np.ones((4, 3)))
    assert load_named_samples(tmp_path / "c.npy", ("input_ids",)) == {}
