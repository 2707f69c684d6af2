"""Work units together read every document once; what can't be used is left out with its row and reason."""

import gzip

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import readers
from data_tools.inputs import find_inputs, plan_units
from data_tools.plan import ContentOptions, WorkUnit
from data_tools.readers import Document, Reject, WholeReject, read_unit
from llamapro.errors import DataError


def options(split="file", text_field="text"):
    return ContentOptions(text_field=text_field, split=split, heldout=0.0)


def read(path, split="file", text_field="text"):
    (file,) = find_inputs([str(path)], text_field)
    units = plan_units([file], options(split, text_field))
    return [item for unit in units for item in read_unit(unit, file, options(split, text_field))]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def rejects(items):
    return [(item.row, item.reason) for item in items if isinstance(item, Reject)]


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(alphabet="ab\u00e9 ", max_size=12), max_size=15),
    cuts=st.lists(st.integers(1, 60), max_size=4),
    ended=st.booleans(),
)
def test_byte_ranges_cut_anywhere_read_each_line_once_in_order(tmp_path_factory, lines, cuts, ended):
    data = "\n".join(lines).encode() + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(data or b"x")
    data = path.read_bytes()
    (file,) = find_inputs([str(path)], "text")
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        unit = WorkUnit(index=0, file=0, start=start, stop=stop, first_row=None, text_bytes=1)
        items = list(read_unit(unit, file, options("line")))
        assert [item.row for item in items] == list(range(len(items)))
        found += [item.text if isinstance(item, Document) else "" for item in items]
    whole = data.decode().split("\n")
    expected = whole[:-1] if whole[-1] == "" else whole
    assert found == [line if line.strip() else "" for line in expected]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)],
)
def test_compressed_and_plain_files_hold_the_same(tmp_path, name, pack):
    lines = [f"text {i} é" for i in range(500)]
    (tmp_path / name).write_bytes(pack(b"".join(orjson.dumps({"text": line}) + b"\n" for line in lines)))
    assert texts(read(tmp_path / name)) == lines


@pytest.mark.parametrize("cut", [1, 9, 200])
@pytest.mark.parametrize(("name", "pack"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)])
def test_a_cut_compressed_file_can_not_be_used_and_is_no_end(tmp_path, name, pack, cut):
    data = pack(b"".join(b"%x line\n" % (i * 7919 % 1000003) for i in range(3000)))
    path = tmp_path / f"a.txt.{name}"
    path.write_bytes(data[:-cut])
    last = read(path, "line")[-1]
    assert isinstance(last, WholeReject) and last.reason == "damaged or cut file"
    assert "end" in last.detail


def test_text_files_are_one_document_or_split_by_line_or_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n\n\nfour\nfive")
    assert texts(read(path, "file")) == ["one\r\ntwo\n\n \nthree\n\n\nfour\nfive"]
    assert texts(read(path, "line")) == ["one", "two", "three", "four", "five"]
    found = [item for item in read(path, "paragraph") if isinstance(item, Document)]
    assert [(item.row, item.text) for item in found] == [(0, "one\ntwo"), (4, "three"), (7, "four\nfive")]


@pytest.mark.parametrize("split", ["file", "paragraph", "line"])
def test_rows_that_are_too_long_are_left_out_without_being_loaded(tmp_path, monkeypatch, split):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"short\n\n" + b"x" * 1000 + b"\n\nlast\n")
    items = read(tmp_path / "a.txt", split)
    if split == "file":
        assert texts(items) == [] and rejects(items) == [(0, readers.TOO_LONG)]
    else:
        assert texts(items) == ["short", "last"] and rejects(items) == [(2, readers.TOO_LONG)]


def test_parquet_text_comes_by_row_group_with_missing_values_left_out(tmp_path):
    values = [f"text {i}" for i in range(50)]
    values[7] = None
    pq.write_table(pa.table({"body": values, "n": list(range(50))}), tmp_path / "a.parquet", row_group_size=8)
    items = read(tmp_path / "a.parquet", text_field="body")
    assert texts(items) == [value for value in values if value]
    assert rejects(items) == [(7, "no value in column 'body'")]


@pytest.mark.parametrize(
    "column",
    [pa.array, lambda values: pa.array(values).dictionary_encode(), lambda values: pa.array(values, pa.large_string())],
)
def test_parquet_texts_are_the_same_however_they_are_stored(tmp_path, column):
    """As a dictionary, as one that is given up for plain values, or plain; with gaps, over several row groups."""
    texts_ = [None if i % 7 == 3 else f"text {i % 5 if i < 40 else i} é" * (1 + i % 3) for i in range(90)]
    stored = column(texts_)
    for name, options in (
        ("dictionary", {}),
        ("given up", {"dictionary_pagesize_limit": 200, "data_page_size": 100}),
        ("plain", {"use_dictionary": False}),
    ):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"n": list(range(90)), "text": stored}), path, row_group_size=32, **options)
        items = read(path)
        assert texts(items) == [text for text in texts_ if text]
        assert rejects(items) == [(i, "no value in column 'text'") for i, text in enumerate(texts_) if text is None]


@pytest.mark.parametrize(
    ("field", "message"), [("nope", "no column 'nope'; it has body, n"), ("n", "holds int64, not text")]
)
def test_parquet_without_the_text_column_is_refused(tmp_path, field, message):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", text_field=field)


def test_a_damaged_parquet_file_can_not_be_used(tmp_path):
    pq.write_table(pa.table({"text": [f"text {i}" * 20 for i in range(500)]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-10])
    (tmp_path / "bad.parquet").write_bytes(data[:100] + bytes(60) + data[160:])
    for name, message in (("cut", "Parquet magic bytes not found"), ("bad", "")):
        last = read(tmp_path / f"{name}.parquet")[-1]
        assert isinstance(last, WholeReject) and last.reason == "damaged or cut file" and message in last.detail
