"""A run folder says what was started, when it changed, and keeps both."""

from pathlib import Path

import orjson
import pytest

from llamapro.errors import UserError
from llamapro.run_folder import RunFolder


def test_names_are_those_of_the_documented_layout(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = {
        folder.config_file: "config.yaml",
        folder.history: "history",
        folder.command_file: "command.txt",
        folder.environment_file: "environment.json",
        folder.metrics_file: "metrics.jsonl",
        folder.tensorboard: "tensorboard",
        folder.checkpoints: "checkpoints",
        folder.latest_pointer: "latest",
        folder.packs: "packs",
        folder.stop_file: "STOP",
        folder.report_file: "report.html",
        folder.rank_log(3): "logs/rank-3.log",
    }
    assert {path: tmp_path / name for path, name in places.items()} == {path: path for path in places}


def test_a_first_start_writes_what_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.prepare("run: {seed: 1}\n", "deepspeed launch/pretrain.py", {"torch": "2.13"})
    assert folder.config_file.read_text() == "run: {seed: 1}\n"
    assert orjson.loads(folder.environment_file.read_bytes()) == {"torch": "2.13"}
    assert folder.command_file.read_text().endswith("+00:00 deepspeed launch/pretrain.py\n")
    assert [path.name for path in folder.history.iterdir()] == ["config-0001.yaml"]


def test_later_starts_are_added_and_earlier_ones_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for text in ("a\n", "a\n", "b\n", "a\n"):
        folder.prepare(text, f"run with {text.strip()}", {})
    assert [path.read_text() for path in sorted(folder.history.iterdir())] == ["a\n", "b\n", "a\n"]
    assert folder.config_file.read_text() == "a\n"
    assert [line.split(" ", 1)[1] for line in folder.command_file.read_text().splitlines()] == [
        "run with a",
        "run with a",
        "run with b",
        "run with a",
    ]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(UserError, match="run.folder"):
        RunFolder(tmp_path / "run").create()
