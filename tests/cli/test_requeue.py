"""`llamapro requeue` counts what a job's restarts achieve."""

from pathlib import Path

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.cli.requeue import MOST_WITHOUT_PROGRESS
from llamapro.errors import EXIT_CHECK_FAILED, EXIT_USAGE
from llamapro.run_folder import RunFolder
from tests.support.config import minimal_values


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    (tmp_path / "run.yaml").write_bytes(orjson.dumps(minimal_values(run={"folder": "run"})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return RunFolder(tmp_path / "run")


def answers(times: int) -> list[int]:
    return [main(["requeue", "run.yaml"]) for _ in range(times)]


def test_without_progress_the_answer_is_no_some_day(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert answers(MOST_WITHOUT_PROGRESS) == [0] * MOST_WITHOUT_PROGRESS
    assert f"restart {MOST_WITHOUT_PROGRESS} of at most {MOST_WITHOUT_PROGRESS}" in capsys.readouterr().err
    assert answers(2) == [EXIT_CHECK_FAILED] * 2
    assert f"ended {MOST_WITHOUT_PROGRESS + 2} times in a row" in capsys.readouterr().err


def test_a_newer_checkpoint_begins_the_count_again(run: RunFolder) -> None:
    for name in ("step-00000004", "step-00000008"):
        assert answers(MOST_WITHOUT_PROGRESS) == [0] * MOST_WITHOUT_PROGRESS
        run.latest_pointer.write_text(f"{name}\n")
    assert answers(1) == [0]


def test_a_job_submitted_anew_begins_at_none(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(MOST_WITHOUT_PROGRESS + 1)[-1] == EXIT_CHECK_FAILED
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert answers(1) == [0]


def test_a_run_asked_to_stop_stays_stopped(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.create()
    run.config_file.write_text("run: {}\n")
    assert main(["stop", str(run.path)]) == 0
    assert answers(1) == [1]
    assert "asked the run to stop" in capsys.readouterr().err


def test_a_damaged_count_is_told(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.create()
    run.restarts_file.write_text("{")
    assert answers(1) == [EXIT_USAGE]
    assert str(run.restarts_file.relative_to(run.path.parent)) in capsys.readouterr().err
