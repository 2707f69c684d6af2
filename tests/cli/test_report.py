"""`llamapro report` as a user runs it."""

from pathlib import Path

import pytest

from llamapro.cli.main import main


def test_several_runs_get_a_page_each_and_their_paths_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text("run: {seed: 1}\n")
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html") for run in runs]
    assert main(["report", str(tmp_path)]) == 2
