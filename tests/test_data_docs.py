"""The pages about data are true: every option is there, every command runs, and their reader reads a dataset."""

import argparse
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamapro.cli import data
from llamapro.cli.main import main
from llamapro.data.dataset import Dataset
from tests.support.config import write_config
from tests.support.data import build, random_texts, save_tokenizer, write_jsonl
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
# What the tiny tokenizer has for it.
FIM_TOKENS = {"<fim_prefix>,<fim_suffix>,<fim_middle>": "<s>,<|im_start|>,<|im_end|>"}
FORMAT_PAGE = (ROOT / "docs" / "data-format.md").read_text()


def commands(page: str = PAGE) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every data command, by name."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    (choices,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return choices


@pytest.mark.parametrize("name", parsers())
def test_every_command_and_every_option_is_on_the_page(name: str) -> None:
    used = "\n".join(command for command in commands() if f"data {name} " in command)
    assert used, f"no command shows llamapro data {name}"
    options = {
        option
        for action in parsers()[name]._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert [option for option in sorted(options) if option not in PAGE] == []


def test_the_page_names_no_option_that_is_not_there() -> None:
    there = {option for parser in parsers().values() for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"(?<!\w)--[a-z][a-z-]*", PAGE)) - there == set()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a model, texts of all kinds, evaluation items and a run."""
    folder = tmp_path_factory.mktemp("page")
    save_tokenizer(folder / "path" / "to" / "base")
    texts = random_texts(60, seed=1)
    for name in ("law.jsonl", "code.jsonl", "crawl/a.jsonl", "crawl/deep/b.jsonl"):
        write_jsonl(folder / name, texts)
    write_jsonl(folder / "exam.jsonl", [texts[3] + " " + " ".join("abcdefghijklm"), texts[4] * 20])
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "books" / "old").mkdir(parents=True)
    (folder / "books" / "old" / "one.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    (folder / "notes.md").write_text("one paragraph\n\nanother one")
    pq.write_table(pa.table({"body": texts}), folder / "table.parquet")
    settings = {
        "run": {"folder": "runs/law"},
        "model": {"path": "path/to/base"},
        "data": {"sequence_length": 64, "sources": {"law": {"path": "data/law", "weight": 1.0}}},
        "batch": {"global_sequences": 2},
        "schedule": {"steps": 5},
    }
    (folder / "runs" / "law").mkdir(parents=True)
    write_config(folder, json.dumps(settings)).rename(folder / "runs" / "law" / "config.yaml")
    return folder


def test_the_commands_run_one_after_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for command in commands():
        program, *arguments = shlex.split(command)
        if program == "mpiexec":
            run_under_mpi(place, arguments)
        else:
            assert program == "llamapro"
            assert main([FIM_TOKENS.get(word, word) for word in arguments]) == 0, command
    law, ranks, imported = (Dataset.open(Path("data") / name) for name in ("law", "by-ranks", "imported"))
    assert law.fingerprint == ranks.fingerprint
    assert imported.manifest.source_files[0].name == "law.bin"
    mixed = Dataset.open(Path("data") / "mixed")
    assert {file.name for file in mixed.manifest.source_files} == {
        "books/old/one.txt.gz", "crawl/a.jsonl", "crawl/deep/b.jsonl", "notes.md",
    }  # fmt: skip


def run_under_mpi(folder: Path, arguments: list[str]) -> None:
    """As root in a container Open MPI wants to be told that it may."""
    assert arguments[:3] == ["-n", "2", "python"]
    launch = [str(Path(sys.executable).with_name("mpiexec")), "--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "-n", "2", sys.executable, *arguments[3:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_reader_on_the_page_reads_every_document(place: Path) -> None:
    dataset = build([place / "law.jsonl"], place / "path" / "to" / "base", place / "read", heldout=0.3)
    (program,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE, re.DOTALL)
    for split in ("train", "heldout"):
        command = [sys.executable, "-c", program, str(dataset.folder), split]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        documents = [json.loads(line) for line in done.stdout.splitlines()]
        shards = dataset.split(split).shards  # type: ignore[arg-type]
        assert documents == [shard.document(i).tolist() for shard in shards for i in range(shard.facts.documents)]
        assert len(documents) > 5
    shard = dataset.split("train").shards[0].path
    content = bytearray(shard.read_bytes())
    content[4096] ^= 1
    shard.write_bytes(content)
    command = [sys.executable, "-c", program, str(dataset.folder), "train"]
    assert subprocess.run(command, capture_output=True).returncode != 0
