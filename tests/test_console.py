"""Progress: sizes and speed of bytes on a terminal and in logs."""

import errno
import io
import os
import re
from collections.abc import Callable
from contextlib import suppress

import pytest
from rich.console import Console

from llamapro import console
from llamapro.errors import EXIT_CHECK_FAILED, EXIT_USAGE, UserError


def test_a_log_says_bytes_and_their_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("copying", 4_000_000_000, "bytes") as advance:
        now += 40
        advance(1_000_000_000)
        now += 10
        advance(3_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "copying: 1,000,000,000 of 4,000,000,000 bytes, 25 MB/s, 120 s left",
        "copying: 4,000,000,000 bytes in 50.0 s, 80 MB/s",
    ]


def test_a_log_says_no_speed_of_other_units(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("scoring", 3, "blocks") as advance:
        advance(3)
    assert re.fullmatch(r"scoring: 3 blocks in [\d.]+ s\n", capsys.readouterr().err)


@pytest.mark.parametrize(("unit", "shown"), [("bytes", True), ("blocks", False)])
def test_the_bar_on_a_terminal_shows_bytes_per_second(monkeypatch: pytest.MonkeyPatch, unit: str, shown: bool) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "_stderr", lambda: Console(file=screen, force_terminal=True, width=120))
    with console.progress("copying", 4_000_000, unit) as advance:
        for _ in range(4):
            advance(1_000_000)
    assert bool(re.search(r"[\d.]+ [kMG]?B/s|bytes/s", screen.getvalue())) is shown


def test_a_log_on_a_full_disk_loses_lines_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # closing it is refused as well
        monkeypatch.setattr(console, "_stderr", lambda: Console(file=full, width=120))
        with pytest.raises(OSError, match="No space left"):
            console._stderr().print("what rich itself does")
        console.info("saved")
        console.warning("slow")
        code = console.guarded(_wrong_use, debug=False)
    assert code == EXIT_USAGE


def _wrong_use() -> int:
    raise UserError("wrong use")


def test_a_full_disk_is_one_message_and_other_errors_of_the_system_are_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(code: int) -> Callable[[], int]:
        def work() -> int:
            raise OSError(code, os.strerror(code), "/data/out/model.safetensors")

        return work

    assert console.guarded(failing(errno.ENOSPC), debug=False) == EXIT_CHECK_FAILED
    assert "/data/out/model.safetensors: No space left on device; nothing half-written" in capsys.readouterr().err
    for code, debug in ((errno.ENOSPC, True), (errno.ENOTCONN, False)):
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            console.guarded(failing(code), debug=debug)


def test_details_follow_in_a_log_and_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = 0
    with console.progress("tokenizing", 4, "bytes", lambda: f"{counted} tokens") as advance:
        counted = 7
        advance(4)
    assert capsys.readouterr().err.endswith("MB/s, 7 tokens\n")
    screen = io.StringIO()
    monkeypatch.setattr(console, "_stderr", lambda: Console(file=screen, force_terminal=True, width=120))
    with console.progress("tokenizing", 4, "bytes", lambda: f"{counted} tokens") as advance:
        counted = 8
        advance(4)
    assert "8 tokens" in screen.getvalue()
