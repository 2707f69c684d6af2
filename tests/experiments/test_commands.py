"""Commands end as a whole: their code is understood, and an interrupt leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamapro.errors import CheckFailed, RetryLater
from llamapro.experiments.commands import deepspeed_command, llamapro_command, output_of, run_command
from tests.support.source import ROOT

# A launcher with one rank, which outlives it: the rank notes when it was asked to stop, and takes a moment to save.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]).wait()
"""
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])

def save(number, frame):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGINT, save)
(folder / "started").touch()
time.sleep(60)
"""
PARENT = """
import sys
from llamapro.experiments.commands import run_command
from llamapro.console import guarded

def work():
    run_command(sys.argv[1:], {})
    return 0

sys.exit(guarded(work, debug=False))
"""


def test_success_and_environment(tmp_path: Path) -> None:
    script = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['DS_ACCELERATOR'])"
    run_command([sys.executable, "-c", script, str(tmp_path / "out")], {"DS_ACCELERATOR": "cpu"})
    assert (tmp_path / "out").read_text() == "cpu"


@pytest.mark.parametrize(("code", "error"), [(1, CheckFailed), (2, CheckFailed), (75, RetryLater)])
def test_ending_code_becomes_an_error(code: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_command([sys.executable, "-c", f"raise SystemExit({code})"], {})


def test_output_is_returned_and_failure_is_an_error() -> None:
    assert output_of([sys.executable, "-c", "import sys; sys.stdout.write('proof')"], {}) == "proof"
    with pytest.raises(CheckFailed, match="exit code 3"):
        output_of([sys.executable, "-c", "raise SystemExit(3)"], {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_until_every_process_has_ended(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", LAUNCHER, RANK, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent.pid, number)
    _, message = parent.communicate(timeout=30)
    assert (tmp_path / "saved").exists(), "the parent returned before the rank had saved"
    assert parent.returncode == 75
    assert "the same command continues" in message


def test_command_lines_use_this_environment() -> None:
    assert llamapro_command("expand", Path("a"))[1:] == ["-m", "llamapro", "expand", "a"]
    command = deepspeed_command(Path("launch/pretrain.py"), 2, "--config", Path("run.yaml"))
    assert Path(command[0]).is_file()
    assert command[1:3] == ["--num_gpus", "2"]
    assert command[-3:] == ["launch/pretrain.py", "--config", "run.yaml"]
