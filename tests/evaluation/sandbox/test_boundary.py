"""Every way out that is known is tried: it works without the sandbox, and not in it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamapro.evaluation.sandbox import run
from llamapro.evaluation.sandbox.probes import FORGED_SUCCESSES, WORKS, escapes, require_sandbox
from llamapro.evaluation.sandbox.run import GUEST, Limits, SandboxRefused, Verdict, run_guest, run_program

UNLIMITED = Limits(
    seconds=30,
    cpu_seconds=60,
    memory_bytes=1 << 40,
    file_bytes=1 << 40,
    open_files=512,
    processes=1 << 20,
)
with escapes() as programs:
    AIMS = tuple(programs)
ROOT_ONLY = {"writing a system file"}
NOT_EVERYWHERE = {
    "making a user namespace": "this machine grants no user namespace to a bare program either",
    "reaching another network": "this machine has no network",
}


def run_in_the_open(program: str) -> Verdict:
    return run_guest([sys.executable, *GUEST], program, UNLIMITED)


@pytest.mark.parametrize("aim", AIMS)
def test_escape_is_blocked_and_works_in_the_open(aim: str) -> None:
    with escapes() as programs:
        assert run_program(programs[aim]) is Verdict.FAILED
        if aim in ROOT_ONLY and os.geteuid() != 0:
            pytest.skip("only root writes system files: no control")
        if aim in NOT_EVERYWHERE and run_in_the_open(programs[aim]) is Verdict.FAILED:
            pytest.skip(f"{NOT_EVERYWHERE[aim]}: no control")
        assert run_in_the_open(programs[aim]) is Verdict.PASSED


@pytest.mark.parametrize("trick", FORGED_SUCCESSES)
def test_program_that_does_not_reach_its_end_has_not_passed(trick: str) -> None:
    assert run_program(FORGED_SUCCESSES[trick]) is Verdict.FAILED


def test_honest_program_passes() -> None:
    assert run_program(WORKS) is Verdict.PASSED
    assert run_program("def f():\n    return 1\nassert f() == 1") is Verdict.PASSED


def test_program_that_does_not_compile_fails() -> None:
    assert run_program("def f(:") is Verdict.FAILED


def test_time_is_limited_and_nothing_is_left_running() -> None:
    forever = "import os, time\nfor _ in range(3):\n    os.fork()\ntime.sleep(600)"
    before = sandboxes()
    start = time.monotonic()
    assert run_program(forever, Limits(seconds=1.0)) is Verdict.TIMED_OUT
    assert time.monotonic() - start < 5
    deadline = time.monotonic() + 5
    while sandboxes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandboxes() - before


def test_processor_time_is_limited() -> None:
    assert run_program("while True:\n    pass", Limits(seconds=20, cpu_seconds=1)) is Verdict.FAILED


def sandboxes() -> set[int]:
    """Ids of the processes that run a guest."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"the agreed exit status" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_self_test_passes_here() -> None:
    require_sandbox()


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxRefused, match="bwrap is not installed"):
        run_program("pass")
    with pytest.raises(SandboxRefused, match="bwrap is not installed"):
        require_sandbox()


def test_bubblewrap_that_can_not_make_the_boundary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(run, "guest_user", lambda: None)
    with pytest.raises(SandboxRefused, match="user namespaces"):
        require_sandbox()
    broken.write_text("no program")
    with pytest.raises(SandboxRefused, match="can't be started"):
        require_sandbox()


def test_self_test_sees_a_bubblewrap_that_isolates_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_door = tmp_path / "bwrap"
    open_door.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    open_door.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(run, "guest_user", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert subprocess.run(["bwrap", "--", "true"]).returncode == 0
    with pytest.raises(SandboxRefused, match="does not hold on this machine"):
        require_sandbox()


def test_interpreter_nobody_can_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "guest_user", lambda: run.NOBODY)
    monkeypatch.setattr(run, "_everybody_may_read", lambda path: False)
    run.guest_python.cache_clear()
    try:
        with pytest.raises(SandboxRefused, match="nobody can read"):
            run.guest_python()
    finally:
        run.guest_python.cache_clear()


def test_limits_are_those_of_the_program_not_of_its_parent() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_AS) == (1 << 28, 1 << 28)"
    assert run_program(program, Limits(memory_bytes=1 << 28)) is Verdict.PASSED
