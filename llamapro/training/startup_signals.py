"""Stop signals before there is anything to save: while torch and DeepSpeed are being imported.

Unhandled they would end the process with a code that says "don't start again", and a job that is preempted in its first
seconds would be lost. Imports nothing that takes long.
"""

import os
import signal
from types import FrameType

from llamapro.errors import EXIT_RETRY


def retry_on_stop_signals() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with 75, until `watch_signals` takes over."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"{name} before the run began; ending with 75: the same command starts it\n".encode())
    os._exit(EXIT_RETRY)
