"""A build's bytes depend on its inputs alone; killed, it continues; what can't be continued or used is said."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.build import build_dataset, make_plan
from data_tools.inspect import Decoder, facts_of, histogram_of, samples_of
from data_tools.request import BuildRequest
from llamapro.data.dataset import Dataset
from llamapro.data.splits import document_hash, is_heldout
from llamapro.data.verify import verify_dataset
from llamapro.errors import DataError, UserError
from tests.support.data import build, random_texts, save_sentencepiece, save_tokenizer, shard_bytes, write_jsonl
from tests.support.shard_reader import read_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve inputs of several formats, so twelve units; `texts` by file name."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {}
    for number in range(10):
        name = f"{number:02d}.jsonl"
        texts[name] = random_texts(40 + number, seed=number)
        write_jsonl(folder / name, texts[name])
    texts["words.txt"] = [f"line {i} of words" for i in range(30)]
    (folder / "words.txt").write_text("\n\n".join(texts["words.txt"]))
    texts["table.parquet"] = random_texts(25, seed=99)
    pq.write_table(pa.table({"text": texts["table.parquet"]}), folder / "table.parquet", row_group_size=10)
    return folder, texts


@pytest.fixture(scope="module")
def built(tmp_path_factory, corpus, tokenizer):
    return build([corpus[0]], tokenizer, tmp_path_factory.mktemp("built") / "law", split="line", heldout=0.15)


def request(corpus, tokenizer, output, **changes):
    values = {"inputs": (str(corpus[0]),), "tokenizer": str(tokenizer), "output": output, "text_field": "text"}
    values |= {"split": "line", "heldout": 0.15, "license": "CC0-1.0", "max_reject_fraction": 0.01, "workers": 1}
    return BuildRequest(**(values | changes))


def test_a_second_reader_decodes_every_document_exactly(built, corpus):
    texts = {(name, row): text for name, found in corpus[1].items() for row, text in enumerate(found)}
    decoder = Decoder(built)
    files = [file.name for file in built.manifest.source_files]
    seen = {}
    for name in ("train", "heldout"):
        for shard in built.split(name).shards:
            read = read_shard(shard.path)
            columns = (read.sections[c] for c in ("source_files", "source_rows", "text_bytes", "hashes"))
            for ids, file, row, size, found_hash in zip(read.documents(), *columns, strict=True):
                row = row // 2 if files[file] == "words.txt" else row  # blank lines lie between its lines
                text = texts[files[file], row]
                assert decoder.decode(np.array(ids)) == text
                assert ids[-1] == 1 and min(ids[:-1]) >= 4
                assert (size, found_hash) == (len(text.encode()), document_hash(text.encode()))
                seen[files[file], row] = name
    assert seen.keys() == texts.keys()


def test_the_split_is_by_text_hash(built, corpus):
    for name in ("train", "heldout"):
        for shard in built.split(name).shards:
            assert (is_heldout(shard.column("hashes"), 0.15) == (name == "heldout")).all()
    assert built.split("heldout").documents > 0


def test_documents_are_shuffled_over_all_inputs(built):
    files = built.split("train").shards[0].column("source_files").tolist()
    assert len(set(files[:40])) >= 8


def test_the_manifest_states_what_was_built(built, tokenizer):
    facts = built.manifest
    assert (facts.license, facts.heldout_fraction, facts.vocab_size, facts.eos_id) == ("CC0-1.0", 0.15, 320, 1)
    assert facts.encoder.startswith("fastokens") and facts.rejects == {}
    assert [file.name for file in facts.source_files] == sorted(file.name for file in facts.source_files)
    assert str(tokenizer) not in (built.folder / "manifest.json").read_text()
    for name in ("train", "heldout"):
        entry = facts.splits[name]
        assert (
            sum(entry.length_histogram) == entry.documents == sum(s.facts.documents for s in built.split(name).shards)
        )
    assert verify_dataset(built.folder) == []
    assert not (built.folder / ".building").exists()


def test_workers_order_and_place_of_inputs_change_no_byte(built, corpus, tokenizer, tmp_path):
    moved = shutil.copytree(corpus[0], tmp_path / "elsewhere")
    inputs = list(moved.iterdir())
    random.Random(1).shuffle(inputs)
    again = build(inputs, tokenizer, tmp_path / "again", split="line", heldout=0.15, workers=3)
    assert again.fingerprint == built.fingerprint
    assert shard_bytes(again.folder) == shard_bytes(built.folder)


def test_several_shards_and_units_hold_the_same_documents(built, corpus, tokenizer, tmp_path, monkeypatch):
    from data_tools import inputs, plan

    monkeypatch.setattr(plan, "SHARD_TEXT_BYTES", 30_000)
    monkeypatch.setattr(inputs, "UNIT_BYTES", 3000)
    many = build([corpus[0]], tokenizer, tmp_path / "many", split="line", heldout=0.15)
    assert len(many.split("train").shards) > 2 and len(many.split("heldout").shards) == 1
    for name in ("train", "heldout"):
        assert documents_of(many, name) == documents_of(built, name)
        sizes = [shard.facts.documents for shard in many.split("train").shards]
        assert min(sizes) > 0.5 * max(sizes)
    assert verify_dataset(many.folder) == []


def documents_of(dataset, split):
    """Where every document came from, with its ids."""
    found = []
    for shard in dataset.split(split).shards:
        files, rows = shard.column("source_files").tolist(), shard.column("source_rows").tolist()
        found += [(*key, shard.document(i).tolist()) for i, key in enumerate(zip(files, rows, strict=True))]
    return sorted(found)


def test_a_build_killed_again_and_again_gives_the_same_bytes(built, corpus, tokenizer, tmp_path):
    output = tmp_path / "law"
    command = [sys.executable, "-m", "llamapro", "data", "build", "--input", str(corpus[0]), "--tokenizer"]
    command += [str(tokenizer), "--output", str(output), "--split", "line", "--heldout", "0.15", "--workers", "2"]
    kept, cut_short = [], []
    for after_units in (1, 5, 9):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for_units(output, after_units, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        cut_short.append(not (output / "manifest.json").exists())
        kept.append({path.name: path.stat().st_mtime_ns for path in (output / ".building" / "units").glob("[0-9]*")})
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert cut_short[0]
    assert all(earlier.items() <= later.items() for earlier, later in zip(kept, kept[1:], strict=False))
    assert shard_bytes(output) == shard_bytes(built.folder)
    assert verify_dataset(output) == []


def wait_for_units(output, count, process):
    """Until `count` units are committed, or the units are all done."""
    units = output / ".building" / "units"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if units.is_dir() and len(list(units.glob("[0-9]*"))) >= count:
            return
        time.sleep(0.002)


def test_workers_do_not_outlive_a_killed_build(corpus, tokenizer, tmp_path):
    command = [sys.executable, "-m", "llamapro", "data", "build", "--input", str(corpus[0]), "--tokenizer"]
    command += [str(tokenizer), "--output", str(tmp_path / "o"), "--split", "line", "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_units(tmp_path / "o", 1, process)
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_finished_build_is_not_done_again(built, corpus, tokenizer, capsys):
    before = (built.folder / "manifest.json").stat().st_mtime_ns
    build_dataset(request(corpus, tokenizer, built.folder))
    assert "already built" in capsys.readouterr().err
    assert (built.folder / "manifest.json").stat().st_mtime_ns == before


def test_a_finished_dataset_of_something_else_is_kept(built, corpus, tokenizer):
    with pytest.raises(UserError, match="already holds a finished dataset"):
        build_dataset(request(corpus, tokenizer, built.folder, heldout=0.2))
    assert Dataset.open(built.folder).fingerprint == built.fingerprint


@pytest.mark.parametrize("output", ["file", "full"])
def test_an_output_that_holds_something_else_is_refused(corpus, tokenizer, tmp_path, output):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is a file|is not empty and holds no dataset"):
        build_dataset(request(corpus, tokenizer, tmp_path / output))


def test_an_unfinished_build_is_only_continued_as_it_was(corpus, tokenizer, tmp_path):
    mine = (shutil.copytree(corpus[0], tmp_path / "in"), None)
    (mine[0] / "00.jsonl").write_text("{}\n" * 30)
    with pytest.raises(DataError, match="rows can't be used"):
        build_dataset(request(mine, tokenizer, tmp_path / "o", max_reject_fraction=0.0))
    again = request(mine, tokenizer, tmp_path / "o")
    with pytest.raises(DataError, match="--heldout was 0.15 and is 0.2.*delete .*building"):
        build_dataset(request(mine, tokenizer, tmp_path / "o", heldout=0.2))
    (mine[0] / "01.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match=r"input 01.jsonl changed \(it had"):
        build_dataset(again)
    shutil.copy2(corpus[0] / "01.jsonl", mine[0] / "01.jsonl")
    os.utime(mine[0] / "02.jsonl")
    with pytest.raises(DataError, match="input 02.jsonl was modified"):
        build_dataset(again)
    (mine[0] / "02.jsonl").unlink()
    with pytest.raises(DataError, match="input 02.jsonl is gone"):
        build_dataset(again)
    other = save_sentencepiece(tmp_path / "sp")
    with pytest.raises(DataError, match="the tokenizer changed"):
        build_dataset(request(mine, other, tmp_path / "o"))


def test_too_many_unusable_rows_stop_the_build_with_file_line_and_reason_and_a_higher_limit_finishes_it(
    tokenizer, tmp_path, capsys
):
    good = [{"text": f"text {i}"} for i in range(80)]
    lines = [orjson.dumps(row) for row in [*good[:40], {"text": ""}, {"body": "x"}, *good[40:]]] + [b"{"]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"3 of 83 rows.*\n  in.jsonl:41: empty text\n  in.jsonl:42: no field 'text'\n"):
        build([tmp_path / "in.jsonl"], tokenizer, tmp_path / "o")
    assert not (tmp_path / "o" / "manifest.json").exists()
    dataset = build([tmp_path / "in.jsonl"], tokenizer, tmp_path / "o", max_reject_fraction=0.05)
    assert "1 of 1 units are done" in capsys.readouterr().err
    assert dataset.manifest.rejects == {"empty text": 1, "invalid JSON": 1, "no field 'text'": 1}
    listed = [orjson.loads(line) for line in (tmp_path / "o" / "rejects.jsonl").read_bytes().splitlines()]
    assert [(row["file"], row["line"]) for row in listed] == [("in.jsonl", 41), ("in.jsonl", 42), ("in.jsonl", 83)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no usable document: 1 × empty file"),
        ("\n\n", "they are empty"),
        ("{}\n[]\n{}\n", "document: 2 × no field 'text'; 1 × not a JSON object. Name the right --text-field"),
    ],
)
def test_inputs_without_documents_are_refused_and_do_not_stand_in_the_way_later(tokenizer, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        build([tmp_path / "in.jsonl"], tokenizer, tmp_path / "o", max_reject_fraction=1.0)
    assert not (tmp_path / "o").exists()
    write_jsonl(tmp_path / "in.jsonl", ["now there is one"])
    assert build([tmp_path / "in.jsonl"], tokenizer, tmp_path / "o", heldout=0.0).split("train").documents == 1


def test_another_licence_for_a_finished_dataset_is_not_ignored_silently(built, corpus, tokenizer, capsys):
    build_dataset(request(corpus, tokenizer, built.folder, license="MIT"))
    assert "keeps its licence 'CC0-1.0'" in capsys.readouterr().err


def test_lines_are_numbered_through_the_units_of_a_file(tokenizer, tmp_path, monkeypatch):
    from data_tools import inputs

    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)
    texts = [f"text {i}" for i in range(60)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    dataset = build([tmp_path / "in.jsonl"], tokenizer, tmp_path / "o", heldout=0.5)
    decoder = Decoder(dataset)
    for name in ("train", "heldout"):
        (shard,) = dataset.split(name).shards
        for index, row in enumerate(shard.column("source_rows").tolist()):
            assert decoder.decode(shard.document(index)) == texts[row]


def test_bos_is_put_before_every_document_where_the_tokenizer_does_it(tmp_path):
    folder = save_sentencepiece(tmp_path / "sp")
    settings = orjson.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(settings | {"add_bos_token": True}))
    texts = ["heart </s> valve", "日本 🙂 lung", "the defect"]
    dataset = build([write_jsonl(tmp_path / "a.jsonl", texts)], folder, tmp_path / "o", heldout=0.0)
    (shard,) = dataset.split("train").shards
    documents = [shard.document(i) for i in range(3)]
    assert all(ids[0] == 1 and ids[-1] == 2 and min(ids[1:-1]) > 2 for ids in documents)
    assert sorted(Decoder(dataset).decode(ids) for ids in documents) == sorted(texts)
    assert dataset.split("heldout").documents == 0


def test_equal_texts_are_held_out_in_every_dataset(built, corpus, tokenizer, tmp_path):
    shared = corpus[1]["03.jsonl"]
    other = build(
        [write_jsonl(tmp_path / "b.jsonl", [*shared, *random_texts(50, seed=77)])],
        tokenizer,
        tmp_path / "o",
        heldout=0.15,
    )
    hashes = {
        name: {split: set(dataset.split(split).shards[0].column("hashes").tolist()) for split in ("train", "heldout")}
        for name, dataset in (("law", built), ("other", other))
    }
    assert hashes["law"]["heldout"] & hashes["other"]["heldout"]
    assert not hashes["law"]["heldout"] & hashes["other"]["train"]
    assert not hashes["law"]["train"] & hashes["other"]["heldout"]


def test_the_plan_does_not_depend_on_where_things_lie(corpus, tokenizer, tmp_path):
    moved = shutil.copytree(corpus[0], tmp_path / "x" / "in")
    here, there = (make_plan(request((place, None), tokenizer, tmp_path / "o")) for place in (corpus[0], moved))
    assert here.digest() == there.digest()
    changed = make_plan(request(corpus, tokenizer, tmp_path / "o", text_field="text", heldout=0.5))
    assert changed.digest() != here.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": 1.5}, "--heldout 1.5"),
        ({"max_reject_fraction": -0.1}, "--max-reject-fraction -0.1"),
        ({"workers": 0}, "--workers 0"),
    ],
)
def test_values_out_of_range_are_refused(corpus, tokenizer, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        request(corpus, tokenizer, tmp_path / "o", **changes)


def test_two_builds_into_one_folder_at_once_are_refused(corpus, tokenizer, tmp_path):
    from llamapro.files.lock import RunLock

    (tmp_path / "o" / ".building").mkdir(parents=True)
    with RunLock(tmp_path / "o" / ".building"), pytest.raises(UserError, match="is in use by process"):
        build_dataset(request(corpus, tokenizer, tmp_path / "o"))


def test_an_inspection_shows_facts_lengths_and_texts(built, corpus):
    facts = dict(facts_of(built))
    assert facts["licence"] == "CC0-1.0" and "16-bit" in facts["stored as"]
    assert sum(count for _, count, _ in histogram_of(built)) == sum(map(len, corpus[1].values()))
    texts = {text for found in corpus[1].values() for text in found}
    shown = samples_of(built)
    assert len(shown) == 6 and all(sample.text in texts for sample in shown)
    assert shown == samples_of(built)
