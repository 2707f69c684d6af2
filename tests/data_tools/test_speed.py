"""Tokenizing is as many times faster than the usual loop as is promised, in one process, on the same file, in turns.

Processor time of a whole work unit (JSON, hashes, ids, frame, sorting, writing) against that of a loop which encodes
one document after another; `python -m benchmarks.tokenize` measures the same of whole builds on large real texts.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import orjson
import pytest

from data_tools.pool import ONE_THREAD
from tests.support.source import ROOT
from tests.support.tokenizers import save_kind

TEXT_BYTES = 2 << 20
PROGRAM = """
import sys, time
from pathlib import Path
from benchmarks import per_document
from data_tools import encode
from data_tools.build import make_plan
from data_tools.request import BuildRequest
from data_tools.work import Work

folder, model = map(Path, sys.argv[1:])
source, output = folder / "a.jsonl", folder / "o"
request = BuildRequest((str(source),), str(model), output, "text", "file", 0.0, "", 0.0, 1)
work = Work(output / ".building")
work.folder.mkdir(parents=True)
work.adopt(make_plan(request))
contestants = {
    "unit": lambda: encode.encode_unit(work.folder, "fastokens", 0),
    "loop": lambda: per_document.main(source, model / "tokenizer.json", 1, folder / "loop"),
}
contestants["unit"]()
best = dict.fromkeys(contestants, float("inf"))
for _ in range(3):
    for name, call in contestants.items():
        start = time.process_time()
        call()
        best[name] = min(best[name], time.process_time() - start)
print(best["loop"] / best["unit"])
"""


@pytest.mark.parametrize(("kind", "least"), [("llama-2", 6.0), ("llama-3", 20.0)])
def test_a_unit_is_many_times_faster_than_a_loop_over_documents(tmp_path: Path, kind: str, least: float) -> None:
    (tmp_path / "model").mkdir()
    save_kind(kind, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 1}')
    write_library(tmp_path / "a.jsonl")
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= least


def write_library(path: Path) -> None:
    """Python's own library: real text of some size on every machine."""
    size = 0
    with path.open("wb") as lines:
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = file.read_text("utf-8")
            if text and size < TEXT_BYTES:
                size += lines.write(orjson.dumps({"text": text}) + b"\n")
    assert size >= TEXT_BYTES
