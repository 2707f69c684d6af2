"""A training program that is told to stop before it has begun says "start me again"."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.errors import EXIT_RETRY
from tests.support.source import ROOT


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_torch_is_imported_asks_to_be_started_again(
    tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "launch" / f"{stage}.py"), "--config", "run.yaml"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "importing\n"
        program.send_signal(number)
        _, said = program.communicate(timeout=10)
    assert program.returncode == EXIT_RETRY
    assert f"{number.name} before the run began" in said


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    body = (
        "import os, signal\n"
        "from llamapro.training.startup_signals import retry_on_stop_signals\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "retry_on_stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT).returncode == 0
