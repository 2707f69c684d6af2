"""Whatever lies in the input folders: documents, rows left out with a reason, or one message; never a crash."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import inputs, readers
from data_tools.inputs import find_inputs, plan_units
from data_tools.plan import ContentOptions
from data_tools.readers import Blank, Document, Reject, WholeReject, read_unit
from llamapro.errors import DataError
from tests.support.data import build, save_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
GOOD = [f"document {number} é 日本" for number in range(200)]


def read(*paths, split="line", option="text"):
    files = find_inputs([str(path) for path in paths], option)
    options = ContentOptions(text_field=option, split=split, heldout=0.0)
    return [item for unit in plan_units(files, options) for item in read_unit(unit, files[unit.file], options)]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def rejects(items):
    return [(item.row, item.reason) for item in items if isinstance(item, Reject)]


def write(path, data):
    path.write_bytes(data)
    return path


def test_an_invalid_row_has_its_own_reason_and_the_next_is_read(tmp_path):
    cases = [
        (b'{"text": "\\xed\\xa0\\x80"}'.decode("unicode_escape").encode("latin-1"), "invalid UTF-8"),
        (b'{"text": "a\\udc00"}', "lone surrogate"),
        (b'{"text": "a\\ud800\\ud800"}', "lone surrogate"),
        (b'{"text": "a", "score": NaN}', "NaN or Infinity, which JSON has not"),
        ('{"é": "日本", "score": -Infinity, "text": "a"}'.encode(), "NaN or Infinity, which JSON has not"),
        (b'{"text": "NaN", }', "invalid JSON"),
        (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
        (b'{"text": "a"', "invalid JSON"),
        (b"\0" * 50, "NUL character"),
        (b'{"text": "a\\u0000"}', "NUL character"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deeply"),
        (b'{"text": ["a"]}', "field 'text' is not text"),
        (b'{"text": null}', "no field 'text'"),
        (b'{"text": true}', "field 'text' is not text"),
        (b'{"text": 5}', "field 'text' is not text"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b"[" * 5000, "JSON nested too deeply"),
        (b'{"Text": "a"}', "no field 'text'"),
        (b'"text"', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"text": "\\u2003\\n"}', "empty text"),
    ]
    lines = [line for bad, _ in cases for line in (bad, b'{"text": "good"}')]
    items = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert rejects(items) == [(2 * number, reason) for number, (_, reason) in enumerate(cases)]
    assert texts(items) == ["good"] * len(cases)


def test_what_is_odd_but_right_is_read(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "marked"}\r', b'{"text": "first", "text": "last"}', b"\r",
        b'\t{"text":"\\ud83d\\ude42"} ', b'\xef\xbb\xbf{"text": "a joined file"}', b'{"text": "no end of line"}',
    ]  # fmt: skip
    items = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert texts(items) == ["marked", "last", "🙂", "a joined file", "no end of line"]
    assert [item.row for item in items if isinstance(item, Blank)] == [2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_a_file_without_anything_in_it_is_counted(tmp_path, name):
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).touch()
    for split in ("file", "line", "paragraph"):
        assert rejects(read(tmp_path / name, split=split)) == [(0, "empty file")]


@pytest.mark.parametrize(("encoding", "said"), [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_other_encodings_are_named_in_every_unit(tmp_path, monkeypatch, encoding, said, pack):
    monkeypatch.setattr(inputs, "UNIT_BYTES", 2000)
    mark = "\ufeff" if encoding.endswith("be") else ""
    path = tmp_path / ("a.txt" if pack is bytes else "a.txt.gz")
    items = read(write(path, pack((mark + "\n".join(GOOD)).encode(encoding))))
    assert items and all(isinstance(item, WholeReject) and item.reason == f"{said} text" for item in items)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt.gz", gzip.compress(b"x\n" * 99, mtime=0) + b"garbage"),
        ("a.txt.gz", b"no gzip at all"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"x\n" * 99) + b"garbage"),
        ("a.txt.zst", gzip.compress(b"x\n" * 99, mtime=0)),
        ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1"),
        ("a.parquet", b""),
    ],
)
def test_a_damaged_file_is_left_out_whole(tmp_path, name, data):
    last = read(write(tmp_path / name, data))[-1]
    assert isinstance(last, WholeReject) and last.reason == "damaged or cut file" and last.detail


def test_joined_gzip_members_zstandard_frames_and_zero_padding_are_read_to_the_end(tmp_path):
    lines = [f"{line}\n".encode() for line in GOOD]
    parts = [b"".join(lines[:70]), b"", b"".join(lines[70:])]
    gz = write(tmp_path / "a.txt.gz", b"".join(map(gzip.compress, parts)) + bytes(600))
    assert texts(read(gz)) == GOOD
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    frames = skippable.join(map(zstandard.ZstdCompressor().compress, parts))
    assert texts(read(write(tmp_path / "a.txt.zst", frames))) == GOOD


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("model"))


def test_a_damaged_file_counts_by_its_share_of_the_text_and_the_rest_is_built(tokenizer, tmp_path):
    folder = tmp_path / "in"
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", [f"{number} {text}" for text in GOOD])
    whole = gzip.compress((folder / "4.jsonl").read_bytes())
    (folder / "4.jsonl").unlink()
    write(folder / "4.jsonl.gz", whole[:-20])
    with pytest.raises(DataError, match=r"about \d+\.\d+% of the text with files that are damaged") as raised:
        build([folder], tokenizer, tmp_path / "out", max_reject_fraction=0.05)
    assert "4.jsonl.gz:" in str(raised.value) and "damaged or cut file: Compressed file ended" in str(raised.value)
    dataset = build([folder], tokenizer, tmp_path / "out", max_reject_fraction=0.5)
    assert sum(split.documents for split in dataset.manifest.splits.values()) == 4 * len(GOOD)
    assert dataset.manifest.rejects == {"damaged or cut file": 1}
    (listed,) = (orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines())
    assert listed["file"] == "4.jsonl.gz" and str(tmp_path) not in listed["reason"]


def test_links_are_followed_once_hidden_files_left_out_and_other_kinds_said(tmp_path, capsys):
    folder, beside = tmp_path / "in", tmp_path / "beside"
    for path in (
        folder / "a.txt",
        folder / ".hidden.txt",
        folder / ".cache" / "b.txt",
        beside / "c.txt",
        folder / "d.pdf",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {path.name}")
    (folder / "link").symlink_to(beside)
    (folder / "loop").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    assert sorted(texts(read(folder))) == ["text of a.txt", "text of c.txt"]
    assert "1 files are of another kind and not read: d.pdf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("nowhere"), os.mkfifo, lambda path: path.symlink_to(path)]
)
def test_what_looks_like_an_input_and_is_no_file_is_refused(tmp_path, make):
    (tmp_path / "a.txt").write_text("text")
    make(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"b\.txt is no file, or a link that leads to none"):
        find_inputs([str(tmp_path)], "text")
    with pytest.raises(DataError, match=r"--input .*b\.txt"):
        find_inputs([str(tmp_path / "b.txt")], "text")


def test_what_may_not_be_read_is_one_message(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"text")
    (file,) = find_inputs([str(path)], "text")
    options = ContentOptions(text_field="text", split="line", heldout=0.0)
    (unit,) = plan_units([file], options)

    def refuse(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # these tests may run as root, who may read everything
    with pytest.raises(DataError, match=r"a\.txt can't be read: Permission denied"):
        find_inputs([str(path)], "text")
    with pytest.raises(DataError, match=r"a\.txt can't be read: Permission denied"):
        list(read_unit(unit, file, options))


READ_IN_A_PROCESS_OF_ITS_OWN = """
import resource, sys
from data_tools import inputs, plan, readers
files = inputs.find_inputs([sys.argv[1]], "text")
options = plan.ContentOptions(text_field="text", split="line", heldout=0.0)
(unit,) = inputs.plan_units(files, options)
for item in readers.read_unit(unit, files[0], options):
    if isinstance(item, readers.Reject):
        print(item.row, item.reason)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def read_and_peak(path):
    """What is left out, and the peak of memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", READ_IN_A_PROCESS_OF_ITS_OWN, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *found, peak = done.stdout.splitlines()
    return found, int(peak) * 1024


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_line_that_would_fill_the_memory_is_left_out_in_bounded_memory(tmp_path, name):
    """The longest row is 64 MiB; the file holds one of 768 MiB in less than a megabyte."""
    pack = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    bomb = write(tmp_path / name, pack(b"a" * (1 << 25)) * 24 + pack(b"\nlast\n"))
    small = write(tmp_path / f"small-{name}", pack(b"last\n"))
    (found, peak), (nothing, least) = read_and_peak(bomb), read_and_peak(small)
    assert (found, nothing) == (["0 longer than 64 MiB"], [])
    assert peak < least + 4 * readers.MAX_ROW_BYTES


def test_a_column_of_repeated_texts_takes_the_memory_of_its_dictionary(tmp_path):
    """A gigabyte of text that a writer stored as one text and a thousand references to it."""
    texts = pa.table({"text": ["a long text " * 80_000] * 1024})
    pq.write_table(texts, tmp_path / "a.parquet")
    pq.write_table(texts.slice(0, 1), tmp_path / "one.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2 << 20 and texts.nbytes > 900 << 20
    (found, peak), (nothing, least) = read_and_peak(tmp_path / "a.parquet"), read_and_peak(tmp_path / "one.parquet")
    assert found == nothing == []
    assert peak < least + (64 << 20)


def test_a_large_row_group_of_different_texts_is_not_held_whole(tmp_path):
    texts = pa.table({"text": [os.urandom(50_000).hex() for _ in range(1600)]})
    pq.write_table(texts, tmp_path / "a.parquet")
    pq.write_table(texts.slice(0, 1), tmp_path / "one.parquet")
    (found, peak), (_, least) = read_and_peak(tmp_path / "a.parquet"), read_and_peak(tmp_path / "one.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1 and texts.nbytes > 150 << 20
    assert found == []
    assert peak < least + (100 << 20)


def test_a_paragraph_without_end_is_left_out_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    path = write(tmp_path / "a.txt", b"one\ntwo\n\n" + b"a line\n" * 1000 + b"\nlast\nlines\n\n\nend")
    items = read(path, split="paragraph")
    assert [(item.row, item.text) for item in items if isinstance(item, Document)] == [
        (0, "one\ntwo"), (1004, "last\nlines"), (1008, "end"),
    ]  # fmt: skip
    assert rejects(items) == [(3, readers.TOO_LONG)]


def packed(name):
    lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in GOOD)
    if name.endswith(".gz"):
        return gzip.compress(lines, mtime=0)
    if name.endswith(".zst"):
        return zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": GOOD, "n": list(range(len(GOOD)))}), sink, row_group_size=64)
        return sink.getvalue().to_pybytes()
    return lines


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "drop"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


def mutated(data, mutations):
    for kind, where, with_what in mutations:
        at = int(where * len(data))
        if kind == "flip":
            data = (
                data[:at]
                + bytes(a ^ b for a, b in zip(data[at:], with_what, strict=False))
                + data[at + len(with_what) :]
            )
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + with_what + data[at:]
        else:
            data = data[:at] + data[at + len(with_what) :]
    return data


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@settings(max_examples=60)
@given(mutations=MUTATIONS)
def test_a_file_that_was_changed_anywhere_gives_documents_and_reasons_or_one_message(tmp_path_factory, name, mutations):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(mutated(packed(name), mutations))
    try:
        items = read(path)
    except DataError as error:
        assert path.name in str(error)
        return
    assert [item.row for item in items[:-1]] == sorted(item.row for item in items[:-1])
    assert items and all(isinstance(item, Document | Reject | Blank) for item in items)
    for item in items:
        if isinstance(item, Document):
            assert item.text.encode() == item.utf8 and item.text.strip() and "\0" not in item.text
