"""`llamapro expand`: its arguments, its exit codes, one clear message instead of a traceback."""

from pathlib import Path

import pytest

from llamapro.cli.main import main
from llamapro.expansion.record import read_record
from tests.support.models import save_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


def test_expands_and_says_what_is_new(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["expand", str(base), str(tmp_path / "out"), "--new-blocks", "2", "--dtype", "bf16"]) == 0
    assert "4 → 6 blocks, new 2, 5 (copies of base blocks 1, 3); 4 tensors zeroed" in capsys.readouterr().out
    record = read_record(tmp_path / "out")
    assert record is not None
    assert (record.base_id, record.base_tensors["lm_head.weight"].dtype) == ("tiny", "BF16")


def test_all_options_reach_the_expansion(base: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["expand", str(base), out, "--new-blocks", "4", "--copies-per-group", "2", "--base-id", "org/x"]) == 0
    assert main(["expand", str(base), out, "--placement", "0,0,3", "--overwrite"]) == 0
    record = read_record(tmp_path / "out")
    assert record is not None
    assert (record.source_blocks, record.base_id) == ((0, 0, 3), "tiny")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--new-blocks", "5"], "at most 4 blocks can be added"),
        ([], "--new-blocks is missing"),
        (["--placement", "importance", "--new-blocks", "1"], "--placement importance: choose"),
        (["--placement", "9"], "blocks 0 to 3, not 9"),
        (["--new-blocks", "1", "--base-id", "/home/me/model"], "--base-id"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["expand", str(base), str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
