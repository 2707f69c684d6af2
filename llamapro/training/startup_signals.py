"""Stop signals outside the training loop: while torch is imported, while ranks are waited for, after the last save.

Unhandled they would end the process with a code that says "don't start again": a job that is preempted in its first
seconds would be lost; and so would one that has saved, because hosts hear a signal at different times and the last of
them may have stopped with the others by then. A thread reads them, as the main thread runs no handler while it waits
in a library. Imports nothing that takes long.
"""

import atexit
import os
import signal
import threading
from collections.abc import Collection
from dataclasses import dataclass
from types import FrameType
from typing import Any

from llamapro.errors import EXIT_RETRY

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def retry_on_stop_signals() -> None:
    """From now on stop signals end this process with 75, but while `watch_signals` has them.

    To be called on the main thread, before anything else registers what is to be done at exit. Signals that the process
    ignores (nohup) stay ignored.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = list(send_stop_signals_to(writer).handlers)
    # A forked child has the same pipe; what is sent to it must not end this process.
    os.register_at_fork(after_in_child=lambda: _forget(watched))
    # Of all that is done at exit the last: then the interpreter stops this thread and forgets its handlers.
    atexit.register(_ignore, watched)
    threading.Thread(target=_end_when_told, args=(reader, watched), name="startup signals", daemon=True).start()


@dataclass(frozen=True)
class FormerSignals:
    """What `send_stop_signals_to` replaced.

    Attributes:
        handlers: of the stop signals that the process does not ignore.
        descriptor: of the wake-up pipe; -1: none.
    """

    handlers: dict[signal.Signals, Any]
    descriptor: int

    def restore(self) -> None:
        """Put them back."""
        signal.set_wakeup_fd(self.descriptor)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def send_stop_signals_to(writer: int) -> FormerSignals:
    """Let the interpreter write the number of each stop signal to a pipe, whatever the main thread does.

    To be called on the main thread. Signals that the process ignores (nohup) stay ignored.

    Args:
        writer: a descriptor that does not block.
    """
    watched = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _do_nothing) for number in watched}
    return FormerSignals(handlers, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))


def _end_when_told(reader: int, watched: Collection[int]) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in watched:
                name = signal.Signals(number).name
                os.write(2, f"{name} outside the training loop; ending with 75: the same command goes on\n".encode())
                os._exit(EXIT_RETRY)


def _forget(watched: Collection[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in watched:
        signal.signal(number, signal.SIG_DFL)


def _ignore(watched: Collection[int]) -> None:
    for number in watched:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler must exist for the interpreter to write the signal's number to the wake-up pipe."""
