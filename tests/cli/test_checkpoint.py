"""`llamapro checkpoint ls|verify|prune RUN` on a run folder with real checkpoints."""

from pathlib import Path

import pytest

from llamapro.cli.main import main
from llamapro.errors import EXIT_CHECK_FAILED, EXIT_USAGE
from llamapro.run_folder import RunFolder
from tests.support.checkpoint import save_solo


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 30, 40):
        save_solo(folder.checkpoints, step, seed=step)
    folder.config_file.write_text("run: {}\n")
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_shows_the_newest_first_and_marks_the_latest(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "step-" in line]
    assert [line.split()[0] for line in lines] == [f"step-000000{step}" for step in (40, 30, 20, 10)]
    assert ["latest" in line for line in lines] == [True, False, False, False]
    assert all("complete" in line for line in lines)


def test_ls_of_a_run_without_checkpoints(tmp_path: Path) -> None:
    RunFolder(tmp_path).config_file.write_text("run: {}\n")
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert main(["checkpoint", "verify", str(tmp_path)]) == EXIT_CHECK_FAILED


def test_verify_passes_and_finds_one_flipped_bit(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run.path)]) == 0
    assert capsys.readouterr().out.count("verified") == 4
    flip(run.checkpoints / "step-00000020" / "rank-00000.safetensors")
    assert main(["checkpoint", "ls", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run.path)]) == EXIT_CHECK_FAILED
    out = capsys.readouterr().out
    assert out.count("verified") == 3 and "differs" in out
    assert (run.checkpoints / "step-00000020").is_dir(), "verify changes nothing"


def test_prune_keeps_what_it_is_told(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run.path), "--keep", "1", "--keep-every-steps", "20"]) == 0
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000020", "step-00000040"]
    assert capsys.readouterr().out.count("deleted") == 2
    assert main(["checkpoint", "prune", str(run.path)]) == 0
    assert "nothing to delete" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--keep", "0"], ["--keep-every-steps", "0"]])
def test_prune_refuses_to_keep_nothing(
    run: RunFolder, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "prune", str(run.path), *arguments]) == EXIT_USAGE
    assert f"{arguments[0]} 0: give at least 1" in capsys.readouterr().err
    assert len(list(run.checkpoints.iterdir())) == 4


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(tmp_path)]) == EXIT_USAGE
    assert "is not a run folder" in capsys.readouterr().err
