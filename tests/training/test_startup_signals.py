"""Told to stop before it has begun, a training program says "start me again"; after its end nothing changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamapro.engine.ports import free_port
from llamapro.errors import EXIT_RETRY
from llamapro.training.startup_signals import STOP_SIGNALS
from tests.support.source import ROOT


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_torch_is_imported_asks_to_be_started_again(
    tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [str(ROOT / "launch" / f"{stage}.py"), "--config", "run.yaml"]
    asks_to_be_started_again(command, f"{tmp_path}:{ROOT}", "importing\n", number)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    body = (
        "import os, signal\n"
        "from llamapro.training.startup_signals import retry_on_stop_signals\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "retry_on_stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_the_other_ranks_are_waited_for_asks_to_be_started_again(number: signal.Signals) -> None:
    """The main thread is inside the library then, for as long as another node takes to come."""
    body = (
        "from llamapro.training.startup_signals import retry_on_stop_signals\n"
        "retry_on_stop_signals()\n"
        "import torch.distributed\n"
        "print('waiting', flush=True)\n"
        f"where = 'tcp://127.0.0.1:{free_port()}'\n"
        "torch.distributed.init_process_group('gloo', init_method=where, rank=0, world_size=2)\n"
    )
    asks_to_be_started_again(["-c", body], str(ROOT), "waiting\n", number, after_seconds=1)


def asks_to_be_started_again(
    arguments: list[str], path: str, line: str, number: signal.Signals, after_seconds: float = 0
) -> None:
    """A Python program that gets a signal some time after it has said this line."""
    command, environment = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == line
        time.sleep(after_seconds)  # until it waits indeed; a signal before that is taken as well
        program.send_signal(number)
        try:
            _, said = program.communicate(timeout=10)
        finally:
            program.kill()
    assert program.returncode == EXIT_RETRY
    assert f"{number.name} outside the training loop" in said


def test_a_signal_to_a_forked_child_ends_the_child_alone() -> None:
    body = (
        "import os, signal, time\n"
        "from llamapro.training.startup_signals import retry_on_stop_signals\n"
        "retry_on_stop_signals()\n"
        "child = os.fork()\n"
        "time.sleep(30 if child == 0 else 0.5)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "_, status = os.waitpid(child, 0)\n"
        "time.sleep(0.5)\n"
        "assert os.WTERMSIG(status) == signal.SIGTERM\n"
    )
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_the_interpreter_ends_does_not_change_the_exit_code(number: signal.Signals) -> None:
    """The interpreter takes the handlers away before it deletes what modules hold."""
    body = (
        "import os, sys\n"
        "from llamapro.training.startup_signals import retry_on_stop_signals\n"
        "class Last:\n"
        f"    def __del__(self, kill=os.kill, own=os.getpid()): kill(own, {number.value}); print('deleted')\n"
        "last = Last()\n"
        "retry_on_stop_signals()\n"
        "sys.exit(75)\n"
    )
    ended = subprocess.run([sys.executable, "-c", body], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (EXIT_RETRY, "deleted\n")
