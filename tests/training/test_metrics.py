"""metrics.jsonl: whole lines, cut back on resume, events kept."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamapro.training.metrics import MetricsLog, cut_back, read_metrics


def test_lines_come_back_as_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.step(1, {"loss": 2.5, "loss/law": 2.0})
    log.event("save", step=1)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "loss": 2.5, "loss/law": 2.0}
    assert second["event"] == "save" and second["step"] == 1


def test_cut_back_drops_later_steps_and_keeps_every_event(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.step(step, {"loss": float(step)})
    log.event("stop", step=5)
    cut_back(path, 3)
    lines = read_metrics(path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["event"] for line in lines if "event" in line] == ["stop"]


def test_a_line_cut_by_a_kill_is_left_out_and_removed_by_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).step(1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1]
    cut_back(path, 1)
    MetricsLog(path).step(2, {"loss": 2.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_full_disk_loses_lines_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when the disk takes a part of a line: the next one must not be glued to it."""
    path, write = tmp_path / "metrics.jsonl", os.write
    log = MetricsLog(path)
    log.step(1, {"loss": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr("os.write", lambda descriptor, data: write(descriptor, data[:7]))
        log.step(2, {"loss": 2.0})
        log.step(3, {"loss": 3.0})
    log.step(4, {"loss": 4.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 4]
    assert path.read_bytes().count(b"\n") == 2
    said = capfd.readouterr().err
    assert said.count("No space left on device") == 1 and "lost lines: 2" in said


def test_a_device_without_space_loses_every_line(capfd: pytest.CaptureFixture[str]) -> None:
    MetricsLog(Path("/dev/full")).event("save failed", step=3)
    assert "/dev/full loses lines until it can be written again" in capfd.readouterr().err


def test_a_tracker_that_fails_is_left_out_from_then_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Full:
        calls = 0

        def log(self, step: int, values: Mapping[str, float]) -> None:
            self.calls += 1
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it has ended already")

    tracker = Full()
    log = MetricsLog(tmp_path / "metrics.jsonl", [tracker])
    log.step(1, {"loss": 1.0})
    log.step(2, {"loss": 2.0})
    log.close()
    assert tracker.calls == 1 and len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert "Full gets no numbers from step 1 on: [Errno 28]" in capfd.readouterr().err


def test_ranks_without_a_path_write_nothing(tmp_path: Path) -> None:
    MetricsLog(None).step(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
