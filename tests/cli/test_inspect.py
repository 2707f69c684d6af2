"""`llamapro inspect`: one row per block and the totals."""

from pathlib import Path

import pytest

from llamapro.cli.main import main
from llamapro.expansion.expand import expand
from tests.support.models import save_tiny_llama


def test_the_table_names_new_blocks_their_source_and_what_was_zeroed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    base = save_tiny_llama(tmp_path / "base")
    expand(str(base), tmp_path / "model", new_blocks=2)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    assert [row[:3] for row in rows] == [
        ["0", "base", "base 0"],
        ["1", "base", "base 1"],
        ["2", "new", "copy of base 1"],
        ["3", "base", "base 2"],
        ["4", "base", "base 3"],
        ["5", "new", "copy of base 3"],
    ]
    assert [row[3] for row in rows] == ["", "", "mlp.down_proj, self_attn.o_proj"] * 2
    assert {row[4] for row in rows} == {"no"}
    assert "in 2 new blocks; base base" in lines[-1]
    assert main(["inspect", str(base)]) == 0
    assert "never expanded" in capsys.readouterr().out


def test_what_is_no_model_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert main(["inspect", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
