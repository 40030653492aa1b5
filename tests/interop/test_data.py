"""Data as people have them: tables, loaders of mappings, texts in Parquet, folders of images."""

import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import clafusion
from clafusion import InputError
from clafusion.cli.app import main
from clafusion.interop.images import image_files, processed
from clafusion.interop.inputs import example_of
from clafusion.interop.tokenizers import tokenised
from clafusion.profiling.batches import data_digest, has_rows, keeps_order, num_rows
from clafusion.profiling.texts import read_texts
from tests.support.hugging_face import directory, network, outputs, texts, tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning")


class Table:
    """What the library datasets returns: columns, of which slices of rows are taken."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def tokens(count=60):
    return torch.randint(3, 20, (count, 8), generator=torch.Generator().manual_seed(0))


def test_a_table_and_a_loader_are_data():
    models = [network("DistilBERT", 1), network("DistilBERT", 1, seed=1)]
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    table = Table(
        {
            "text": texts(60),
            "idx": list(range(60)),
            "input_ids": ids.tolist(),
            "attention_mask": list(mask),
            "labels": [[i] * (i % 3) for i in range(60)],
        }
    )
    assert keeps_order(table)
    assert num_rows(table) == 60
    assert has_rows(table, 60)
    assert not has_rows(table, 61)
    assert data_digest(table) == data_digest(table)
    assert list(example_of(table, models[0])) == ["input_ids", "attention_mask"]
    rows = [
        {"input_ids": one, "attention_mask": other, "labels": 0}
        for one, other in zip(ids, mask, strict=True)
    ]
    plain = [{"input_ids": ids, "attention_mask": mask}]
    found = [
        clafusion.fuse(models, data, calibration="none").model
        for data in (plain, table, DataLoader(rows, batch_size=60))
    ]
    wanted = found[0].state_dict()
    for one in found[1:]:
        assert all(torch.equal(value, wanted[name]) for name, value in one.state_dict().items())
    table.columns["input_ids"][1] = [3]
    with pytest.raises(InputError, match=r"column 'input_ids': rows 0 and on have unlike lengths"):
        num_rows(table)


def test_texts_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = texts(5)
    table = pyarrow.table({"review": lines, "title": ["x"] * 5, "stars": [1, 2, 3, 4, 5]})
    parquet.write_table(table, tmp_path / "texts.parquet")
    assert read_texts(tmp_path / "texts.parquet", "review") == lines
    assert read_texts(tmp_path / "texts.parquet", "review", 2) == lines[:2]
    for column, message in (
        (None, "has the columns review, title, stars: say which"),
        ("body", "has no column 'body'"),
        ("stars", "row 1: 'stars' holds a int, no text"),
    ):
        with pytest.raises(InputError, match=message):
            read_texts(tmp_path / "texts.parquet", column)
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad.parquet' cannot be read"):
        read_texts(tmp_path / "bad.parquet")


def test_parquet_needs_its_library(tmp_path, monkeypatch):
    (tmp_path / "texts.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs the library pyarrow: install it, or give .jsonl"):
        read_texts(tmp_path / "texts.parquet")


def test_texts_that_become_the_same_tokens_are_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="gives all of these texts the same tokens"):
        tokenised(["one", "two", "three"], tmp_path)
    assert len(tokenised(["the cat", "the cat"], tmp_path)[0]["input_ids"]) == 2


# --- images -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Return a folder with images of two classes."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        file = tmp_path / f"photos/{'ab'[i // 30]}/{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels.numpy()).save(file)
    (tmp_path / "photos/notes.txt").write_text("no image")
    return tmp_path / "photos"


def with_processor(path, **more):
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, **more}))
    return path


def test_a_folder_of_images_is_data(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, layers, seed in (("a", 2, 0), ("b", 1, 1)):
        with_processor(directory(tmp_path / name, network("ViT", layers, seed)))
    some = image_files(photos, 4)
    assert [one.name for one in some] == ["00.png", "15.png", "30.png", "45.png"]
    (batch,) = processed(some, tmp_path / "a")
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert float(batch["pixel_values"].abs().max()) <= 1.0
    command = ["fuse", "a", "b", "--data=photos", "--calibration=none"]
    assert main([*command, "--out=fused"]) == 0, capsys.readouterr().err
    fused = clafusion.load("fused")
    assert outputs(fused, batch).shape == (4, 5)
    for more, message in (
        (["--scale=255"], "--scale does not fit the data 'photos', which holds images"),
        (["--text-column=x"], "--text-column does not fit the data 'photos'"),
    ):
        assert main([*command, "--out=more", *more]) == 2
        assert message in capsys.readouterr().err


def test_images_that_cannot_be_read_are_refused(photos, tmp_path):
    path = directory(tmp_path / "a", network("ViT", 1))
    files = image_files(photos)
    with pytest.raises(InputError, match="has no image processor"):
        processed(files, path)
    with pytest.raises(InputError, match=r"photos/none' holds no images|holds no images"):
        image_files(path)
    (path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"image processor in .* cannot be read"):
        processed(files, path)
    with_processor(path)
    files[0].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"the image .*00.png' cannot be read"):
        processed(files, path)


def test_a_mask_by_place_or_misspelt_is_no_label():
    parents = [network("GPT-2", 2, seed) for seed in (0, 1)]
    tokens = torch.randint(3, 23, (60, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[::2, 3:] = 0
    with pytest.raises(InputError, match="the second looks like an attention mask"):
        clafusion.fuse(parents, [(tokens, mask)])
    with pytest.raises(InputError, match=r"'attention_masks', .* is it 'attention_mask'"):
        clafusion.fuse(parents, [{"input_ids": tokens, "attention_masks": mask}])
    with pytest.raises(InputError, match="batch 1 has 'attention_mask', which the first batch"):
        clafusion.fuse(
            parents, [{"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}]
        )
    labels = torch.randint(0, 2, (60,))
    clafusion.fuse(parents, [(tokens, labels)], calibration="none")


def test_a_number_beyond_the_vocabulary_is_told():
    parents = [network("GPT-2", 2, seed) for seed in (0, 1)]
    with pytest.raises(InputError, match=r"input_ids \(3, 5\) .* beyond the table"):
        clafusion.fuse(parents, [{"input_ids": torch.full((60, 5), 999)}])


def test_a_mapping_beside_labels_is_a_batch():
    parents = [network("GPT-2", 2, seed) for seed in (0, 1)]
    tokens = torch.randint(3, 23, (60, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens}
    found = [
        clafusion.fuse(parents, data, calibration="none").model.state_dict()
        for data in ([batch], [(batch, torch.zeros(60))])
    ]
    assert all(torch.equal(found[0][name], one) for name, one in found[1].items())
