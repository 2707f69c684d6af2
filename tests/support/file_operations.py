"""Every operation that changes the file system, seen one by one: to record them, or to die at a chosen one."""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMED = ("rename", "replace", "mkdir", "unlink", "rmdir")
Seen = Callable[[str, tuple[str, ...]], None]


@contextmanager
def observed(see: Seen) -> Iterator[None]:
    """Call `see(operation, paths)` before each operation of this process while the block runs.

    Operations: rename, replace, mkdir, unlink, rmdir, create (a file is opened for writing), write, fsync. Writes of
    buffered files happen at their close or flush and are not seen on their own.
    """
    former = {name: getattr(os, name) for name in (*NAMED, "open", "write", "fsync")}
    io_open = io.open

    def named(name: str) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            see(name, tuple(os.fspath(path) for path in paths if isinstance(path, str | os.PathLike)))
            return former[name](*paths, **options)

        return call

    def described(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            see(name, (os.readlink(f"/proc/self/fd/{descriptor}"),))
            return former[name](descriptor, *rest)

        return call

    def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            see("create", (os.fspath(path),))
        return int(former["open"](path, flags, *rest, **options))

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+") and not isinstance(file, int):
            see("create", (os.fspath(file),))
        return io_open(file, mode, *rest, **options)

    try:
        for name in NAMED:
            setattr(os, name, named(name))
        os.fsync, os.write, os.open = described("fsync"), described("write"), os_open
        io.open = builtins.open = opened
        yield
    finally:
        for name, function in former.items():
            setattr(os, name, function)
        io.open = builtins.open = io_open


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child process that is killed before its n-th operation (from 1); whether it was killed."""
    child = os.fork()
    if child == 0:
        _die_at(operation, work)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed in the child"
    return False


def _die_at(operation: int, work: Callable[[], object]) -> None:
    seen = 0

    def see(name: str, paths: tuple[str, ...]) -> None:
        nonlocal seen
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        with observed(see):
            work()
        code = 0
    finally:
        os._exit(code)


class DurabilityRules:
    """Checks, operation by operation, that nothing gets its final name before it is durable.

    A file is durable when it was fsynced after it was last written; a name is durable when its folder was fsynced after
    the name changed. Give `forget` a path to pretend that it was never fsynced.
    """

    def __init__(self, forget: str | None = None) -> None:
        self.violations: list[str] = []
        self.synced: list[str] = []
        self._forget = forget
        self._unsynced_data: set[str] = set()
        self._unsynced_names: set[str] = set()

    def see(self, name: str, paths: tuple[str, ...]) -> None:
        """Take note of one operation."""
        first = str(Path(paths[0]))
        if name == "fsync":
            self.synced.append(first)
            if first != self._forget:
                self._unsynced_data.discard(first)
                self._unsynced_names.discard(first)
        elif name in ("create", "write"):
            self._unsynced_data.add(first)
        if name in ("create", "mkdir", "unlink", "rmdir"):
            self._unsynced_names.add(str(Path(first).parent))
        if name in ("rename", "replace"):
            self._renamed(first, str(Path(paths[1])))

    def finish(self) -> None:
        """At the end nothing may be left that a power cut could take away."""
        self.violations += [f"{path} was never made durable" for path in self._unsynced_data | self._unsynced_names]

    def _renamed(self, source: str, target: str) -> None:
        for path in self._unsynced_data | self._unsynced_names:
            if path == source or path.startswith(f"{source}/"):
                self.violations.append(f"{source} was renamed before {path} was durable")
        parent = str(Path(target).parent)
        if Path(target).name == "latest":
            others = self._unsynced_names - {parent}
            self.violations += [f"latest moved before {path} was durable" for path in others]
        self._unsynced_names.add(parent)
