"""`llamapro doctor` as a command: alone, under a launcher, and with something amiss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.cli.main import main
from llamapro.engine.ports import free_port
from tests.support.source import ROOT

SECONDS = 300
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**clean, "PYTHONPATH": str(ROOT), **variables}


def test_a_machine_that_can_train_ends_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    out, told = capfd.readouterr()
    assert "torch" in out and "attention" in out and "nothing stands in the way" in told
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_put_right_ends_with_1() -> None:
    limited = f"ulimit -n 128; exec {sys.executable} -m llamapro doctor"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1, done.stderr
    assert "to be put right: open files" in done.stderr and "ulimit -n 65536" in done.stdout


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path / "missing")]) == 2
    assert "there is no such folder" in capfd.readouterr().err


def test_two_ranks_under_a_launcher_end_alike_and_speak_once(tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--folder", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, f"--local_rank={rank}"],
            env=environment(**common, RANK=str(rank), OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=SECONDS) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "all-reduce, all ranks" in said[0][0] and "versions and devices" in said[0][0]
    assert "ranks 0, 1 on the CPU" in said[0][1]
    assert said[1][0] == ""
