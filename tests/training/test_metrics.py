"""metrics.jsonl: whole lines, cut back on resume, events kept."""

from pathlib import Path

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


def test_ranks_without_a_path_write_nothing(tmp_path: Path) -> None:
    MetricsLog(None).step(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
