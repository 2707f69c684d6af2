"""`llamapro stop RUN` writes the file that the run looks for."""

from pathlib import Path

import pytest

from llamapro.cli.main import main
from llamapro.errors import EXIT_USAGE
from llamapro.run_folder import RunFolder
from llamapro.training.signals import watch_signals


def test_the_running_process_sees_the_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    run.config_file.write_text("run: {}\n")
    with watch_signals(grace_seconds=60, step_timeout_seconds=60, stop_file=run.stop_file) as stop:
        assert main(["stop", str(tmp_path)]) == 0
        assert stop.requested
    assert str(tmp_path / "STOP") in capsys.readouterr().out


@pytest.mark.parametrize(("make", "reason"), [(True, "is not a run folder"), (False, "does not exist")])
def test_what_is_no_run_folder_is_refused(
    tmp_path: Path, make: bool, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "elsewhere"
    if make:
        folder.mkdir()
    assert main(["stop", str(folder)]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert f"{folder} {reason}" in message and "run.folder" in message
    assert not (folder / "STOP").exists()
