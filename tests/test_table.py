"""Tables of plain values."""

import pytest

from clafusion import InputError
from clafusion.table import Table

TABLE = Table(("name", "value", "note"), (("a, b", 0.123456, None), ('"c"', 2, None)))


def test_a_csv_file_is_quoted_and_keeps_every_digit(tmp_path):
    path = tmp_path / "a.csv"
    assert TABLE.to_csv(path) == 'name,value,note\n"a, b",0.123456,\n"""c""",2,\n'
    assert path.read_text() == TABLE.to_csv()
    with pytest.raises(InputError, match=r"must end with \.csv$"):
        TABLE.to_csv(tmp_path / "a.txt")


def test_columns_of_which_nothing_is_known_are_left_out():
    assert Table.of(TABLE.columns, TABLE.rows).columns == ("name", "value")
    assert Table.of(("a", "b"), []).columns == ("a", "b")


def test_rows_are_dictionaries_and_cells_are_short():
    assert next(iter(TABLE)) == {"name": "a, b", "value": 0.123456, "note": None}
    assert len(TABLE) == 2
    assert TABLE.cells() == [["a, b", "0.1235", ""], ['"c"', "2", ""]]


def test_a_frame_is_written_as_parquet_and_comes_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = (("a", "auto", 1, 0.5), ("b", 0.25, 2, None))
    frame = Table(("name", "anchor", "count", "value"), rows).to_frame()
    assert frame["anchor"].tolist() == ["auto", "0.25"]
    assert frame["count"].tolist() == [1, 2]
    assert frame["value"].isna().tolist() == [False, True]
    frame.to_parquet(tmp_path / "frame.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "frame.parquet"), frame)
    assert list(Table(("a", "b"), ()).to_frame().columns) == ["a", "b"]
