"""Which files are read, and how they are cut."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import inputs
from data_tools.inputs import find_inputs, plan_units
from data_tools.plan import ContentOptions
from llamapro.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.jsonl.gz", "sub/d.csv", ".hidden/e.txt", "README"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some text\n")
    return tmp_path / "corpus"


def names(patterns):
    return [file.name for file in find_inputs(list(map(str, patterns)), "text")]


def test_folders_hold_what_is_known_and_not_hidden(corpus):
    assert names([corpus]) == ["a.jsonl", "b.txt", "sub/c.jsonl.gz"]


def test_globs_files_and_folders_are_read_once_in_the_order_of_names(corpus):
    assert names([corpus / "b.txt", corpus / "*.txt", corpus / "**/*.gz", corpus]) == names([corpus])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("sub/d.csv", "can't tell what this is; its name must end in .jsonl"),
        ("nothing.txt", "there is no such file or folder"),
        (".hidden/*.csv", "there is no such file or folder"),
    ],
)
def test_what_can_not_be_read_is_said(corpus, pattern, message):
    with pytest.raises(DataError, match=message):
        names([corpus / pattern])


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(DataError, match="there is no file ending in"):
        names([tmp_path])


def units_of(path, split="file"):
    file = find_inputs([str(path)], "text")
    return plan_units(file, ContentOptions(text_field="text", split=split, heldout=0.0))


def test_lines_are_cut_by_bytes_and_what_can_not_be_cut_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(b"x" * 25)
    (tmp_path / "a.txt").write_bytes(b"x" * 25)
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 25)
    assert [(u.start, u.stop) for u in units_of(tmp_path / "a.jsonl")] == [(0, 10), (10, 20), (20, 25)]
    assert [(u.start, u.stop) for u in units_of(tmp_path / "a.txt", "line")] == [(0, 10), (10, 20), (20, 25)]
    assert [(u.start, u.stop) for u in units_of(tmp_path / "a.txt", "paragraph")] == [(0, None)]
    assert [(u.start, u.stop) for u in units_of(tmp_path / "a.jsonl.gz")] == [(0, None)]


def test_parquet_is_cut_by_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT_BYTES", 500)
    table = pa.table({"text": [f"{i}" * 40 for i in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, compression="none", use_dictionary=False)
    units = units_of(tmp_path / "a.parquet")
    assert len(units) > 2
    assert [u.start for u in units][1:] == [u.stop for u in units][:-1] and units[-1].stop == 10
    assert [u.first_row for u in units] == [4 * u.start for u in units]


def test_a_change_in_head_tail_or_size_changes_the_digest(tmp_path):
    path = tmp_path / "a.txt"
    digests = set()
    for data in (b"a" * 200_000, b"b" + b"a" * 199_999, b"a" * 199_999 + b"b", b"a" * 200_001):
        path.write_bytes(data)
        digests.add((find_inputs([str(path)], "text")[0].digest, len(data)))
    assert len(digests) == 4
