"""Runs the public commands, each as the user would, and shows its command line.

A command gets a process group of its own. Ctrl-C and SIGTERM reach it as one interrupt, and nothing returns before its
last process has ended: training has then saved, and no rank is left behind.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llamapro import console
from llamapro.engine.ports import free_port
from llamapro.errors import EXIT_RETRY, CheckFailed, RetryLater

STOP_SECONDS = 90.0
POLL_SECONDS = 0.2


def llamapro_command(*arguments: str | Path) -> list[str]:
    """`llamapro …` with this environment's Python."""
    return [sys.executable, "-m", "llamapro", *map(str, arguments)]


def deepspeed_command(script: Path, ranks: int, *arguments: str | Path) -> list[str]:
    """`deepspeed --num_gpus RANKS script …` on a free port; the launcher counts CPU processes as GPUs too."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    head = [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), "--quiet"]
    return [*head, str(script), *map(str, arguments)]


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run one command to its end; its output goes to this terminal.

    Raises:
        CheckFailed: it failed; its own message stands above.
        RetryLater: it saved and asks to be started again.
    """
    console.info(f"  $ {_shown(command)}")
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, process_group=0)
    with _interruptible(process):
        code = process.wait()
    if code == EXIT_RETRY:
        raise RetryLater("stopped after saving; the same command continues")
    if code:
        raise CheckFailed(f"this command ended with exit code {code}, its message stands above:\n  {_shown(command)}")


def output_of(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run one short command and return what it prints.

    Raises:
        CheckFailed: it failed; its own message stands above.
    """
    console.info(f"  $ {_shown(command)}")
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise CheckFailed(f"this command ended with exit code {done.returncode}:\n  {_shown(command)}\n{done.stdout}")
    return done.stdout


@contextmanager
def _interruptible(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.info("interrupted: waiting until the running command has saved and ended")
        _stop_group(process)
        raise RetryLater("interrupted; the same command continues where this one stopped") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_group(process: "subprocess.Popen[bytes]") -> None:
    _signal_group(process.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        process.poll()  # reaps it, so that the group can become empty
        if not _signal_group(process.pid, 0):
            return
        time.sleep(POLL_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: only look); whether the group still had a process."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _shown(command: Sequence[str]) -> str:
    text = shlex.join(command).replace(f"{sys.executable} -m llamapro", "llamapro")
    for folder in (Path(sys.executable).parent, Path.cwd()):
        text = text.replace(f"{folder}/", "")
    return text
