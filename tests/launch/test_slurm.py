"""The batch script: srun's code decides whether the job goes back to the queue."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.source import ROOT

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"


def submit(folder: Path, code: int, restarts: int = 0) -> tuple[int, list[str]]:
    """Run the script with a pretended srun that ends with `code`; returns its code and the recorded calls."""
    record = folder / "calls"
    for name, ending in (("srun", code), ("scontrol", 0)):
        command = folder / name
        command.write_text(f'#!/bin/sh\necho "{name} $*" >> {record}\nexit {ending}\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(
        ["bash", str(SCRIPT), "run.yaml", "--schedule.steps", "9"], env=environment, capture_output=True, text=True
    )
    return done.returncode, record.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_done_or_failed_is_not_requeued(tmp_path: Path, code: int) -> None:
    ending, calls = submit(tmp_path, code)
    assert ending == code
    assert len(calls) == 1
    assert calls[0].endswith("launch/pretrain.py --config run.yaml --schedule.steps 9")


def test_saved_is_requeued(tmp_path: Path) -> None:
    ending, calls = submit(tmp_path, 75)
    assert ending == 75
    assert calls[1:] == ["scontrol requeue 77"]


def test_requeueing_ends_some_day(tmp_path: Path) -> None:
    _, calls = submit(tmp_path, 75, restarts=50)
    assert len(calls) == 1
