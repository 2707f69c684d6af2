"""`llamapro report` as a user runs it."""

from pathlib import Path

import orjson
import pytest

from llamapro.cli.main import main
from tests.support.data import build, save_tokenizer, write_jsonl


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("one", "two")]
    for number, run in enumerate(folders):
        run.mkdir()
        (run / "config.yaml").write_text(f"run: {{seed: {number}}}\n")
    return folders


def test_one_run_gets_its_page_and_several_get_one_together(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs[0])]) == 0
    assert main(["report", *map(str, runs)]) == 0
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "new" / "both.html")]) == 0
    pages = [runs[0] / "report.html", runs[0] / "comparison.html", tmp_path / "new" / "both.html"]
    assert capsys.readouterr().out.split() == list(map(str, pages))
    assert pages[1].read_bytes() == pages[2].read_bytes()
    assert not (runs[1] / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{root}"], "is no run folder"),
        (["{one}", "{one}"], "named twice"),
        (["{one}", "--output", "{one}/config.yaml"], "ends in .html"),
        (["{one}", "{two}", "--evaluation", "{root}"], "--evaluation is for the page of one run"),
        (["{one}", "--evaluation", "{root}"], "no results"),
        (["{one}", "--samples", "{one}/config.yaml"], "can't be read as JSON lines"),
        (["{one}", "--samples", "{root}/bad.jsonl"], "line 2: expected an object with continuation, model, prompt"),
        (["{one}", "--output", "{one}/config.yaml/page.html"], "name another file with --output"),
    ],
)
def test_what_can_not_be_done_is_said(
    words: list[str], said: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"model": "m", "prompt": "p", "continuation": "c"}\n{"model": "m"}\n')
    places = {"root": tmp_path, "one": runs[0], "two": runs[1]}
    assert main(["report", *(word.format(**places) for word in words)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_page_shows_what_the_model_saw_and_what_models_wrote(runs: list[Path], tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "law.jsonl", ["the law is the law of the land"] * 3)
    dataset = build([tmp_path / "law.jsonl"], tmp_path / "tokenizer", tmp_path / "data", heldout=0.0)
    sources = {"law": {"path": str(dataset.folder)}, "gone": {"path": str(tmp_path / "gone")}}
    (runs[0] / "config.yaml").write_bytes(orjson.dumps({"data": {"sources": sources}}))
    written = {"model": "work/after", "prompt": "<b>Once", "continuation": "upon a time"}
    (tmp_path / "samples.jsonl").write_bytes(orjson.dumps(written))
    assert main(["report", str(runs[0]), "--samples", str(tmp_path / "samples.jsonl")]) == 0
    page = (runs[0] / "report.html").read_text()
    assert "<h3>law<span>law.jsonl, row " in page
    assert "the law is the law of the land</blockquote>" in page
    assert "gone<span>" not in page
    assert "<h3>after</h3>" in page and "&lt;b&gt;Once<mark>upon a time</mark>" in page


def test_dataset_that_is_damaged_is_named_and_the_page_is_written(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{")
    config = {"data": {"sources": {"law": {"path": str(tmp_path / "data")}}}}
    (runs[0] / "config.yaml").write_bytes(orjson.dumps(config))
    assert main(["report", str(runs[0])]) == 0
    assert "<h3>law<span>can&#39;t be shown: " in (runs[0] / "report.html").read_text()
