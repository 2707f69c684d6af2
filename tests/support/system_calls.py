"""System calls of a child process, seen by strace: recorded, refused, or the last thing that the process does.

Unlike `file_operations` nothing in the process itself takes part, so what a library or the interpreter does on its own
is seen too.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ATTACH_SECONDS = 30.0
# "?": not every processor's system has each of them.
CHANGING = (
    *("openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "?rename", "renameat", "renameat2"),
    *("?mkdir", "mkdirat", "?unlink", "unlinkat", "?rmdir", "?link", "linkat"),
)
REFUSED = 3
"""Exit code of a child whose work raised the error that was expected of it."""
_CALL = re.compile(r"^\d+\s+(?P<name>\w+)\((?P<arguments>.*)\)\s+=\s+(?P<result>-?\d+)", re.MULTILINE)
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"^(?P<task>\d+)\s+<\.\.\. \w+ resumed>(?P<rest>.*)$")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"|<([^>]*)>')


@dataclass(frozen=True)
class Call:
    """One system call that returned.

    Attributes:
        paths: of its arguments, those behind descriptors included.
    """

    name: str
    paths: tuple[str, ...]
    result: int


@dataclass(frozen=True)
class Traced:
    """What became of a child.

    Attributes:
        code: its exit code, negative for the signal that killed it.
    """

    code: int
    calls: tuple[Call, ...]


def require_strace() -> None:
    """Skip the test where processes can't be traced."""
    if reason := _obstacle():
        pytest.skip(reason)


@cache
def _obstacle() -> str:
    """Why strace can't be used here; empty where it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    tried = subprocess.run([strace, "-e", "inject=close:error=EIO:when=9999", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace can't trace here: {tried.stderr.strip()}"


def traced(
    work: Callable[[], object],
    log: Path,
    inject: str = "",
    *,
    expected: type[Exception] | tuple[type[Exception], ...] = (),
    threads: bool = False,
) -> Traced:
    """Run `work` in a forked child under strace.

    Args:
        log: where strace writes.
        inject: what the kernel does instead, as strace's `inject=` takes it: "write:error=EIO:when=3".
        expected: an error that `work` may raise; the child ends with REFUSED.
        threads: also see and disturb the threads that `work` starts; every thread has its own count of calls.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _serve(work, reader, expected)
    calls = ",".join(CHANGING)
    names = f"{calls},{inject.partition(':')[0]}" if inject else calls
    command = ["strace", "-q", "-y", "-s", "0", "-o", str(log), "-e", f"trace={names}", "-e", "signal=none"]
    command += ["-e", f"inject={inject}"] if inject else []
    command += ["-f"] if threads else []
    # The process identifier stands at the start of each line only where several processes are followed.
    tracer = subprocess.Popen([*command, "-p", str(child)], stderr=subprocess.PIPE)
    _wait_until_attached(child, tracer)
    os.write(writer, b"!")
    _, status = os.waitpid(child, 0)
    tracer.communicate()
    os.close(reader)
    os.close(writer)
    lines = log.read_text(errors="replace").splitlines()
    text = "\n".join(_joined(lines) if threads else (f"0 {line}" for line in lines))
    found = tuple(
        Call(m["name"], tuple(a or b for a, b in _PATH.findall(m["arguments"]) if a or b), int(m["result"]))
        for m in _CALL.finditer(text)
    )
    return Traced(os.waitstatus_to_exitcode(status), found)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Whole calls, in the order of their returns: strace tears a call in two when another thread's comes between."""
    begun: dict[str, str] = {}
    for line in lines:
        task = line.partition(" ")[0]
        if line.endswith(_UNFINISHED):
            begun[task] = line.removesuffix(_UNFINISHED)
        elif resumed := _RESUMED.match(line):
            yield begun.pop(task) + resumed["rest"]
        else:
            yield line


def _serve(work: Callable[[], object], reader: int, expected: type[Exception] | tuple[type[Exception], ...]) -> None:
    code = 1
    try:
        with suppress(OSError):  # the wait itself may be a call that is refused
            os.read(reader, 1)
        work()
        code = 0
    except expected:
        code = REFUSED
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)


def _wait_until_attached(child: int, tracer: "subprocess.Popen[bytes]") -> None:
    status, end = Path(f"/proc/{child}/status"), time.monotonic() + ATTACH_SECONDS
    while re.search(r"^TracerPid:\t0$", status.read_text(), re.MULTILINE):
        assert tracer.poll() is None and time.monotonic() < end, "strace did not attach"
        time.sleep(0.002)
