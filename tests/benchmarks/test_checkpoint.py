"""What saves cost: ratios within rounds, and the same state for every contestant."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from benchmarks.checkpoint import AT_ONCE, CONTESTANTS, DEEPSPEED, OURS, RAW, WITHOUT_FROZEN, summary, verdict
from tests.support.source import ROOT

FLOAT32_STATES = 3


def outcome(stalled: float, safe: float = 1.0, written: float = 1e6) -> dict[str, float]:
    return {"stalled": stalled, "lost": stalled, "safe": safe, "bytes": written}


def test_ratios_are_taken_round_by_round() -> None:
    rounds = [
        {name: outcome(4.0, 8.0, 3e6) for name in CONTESTANTS} | {RAW: outcome(2.0), OURS: outcome(1.0)},
        {name: outcome(4.0, 8.0, 3e6) for name in CONTESTANTS} | {RAW: outcome(8.0), OURS: outcome(2.0)},
        {name: outcome(4.0, 8.0, 3e6) for name in CONTESTANTS} | {RAW: outcome(1.0), OURS: outcome(0.5)},
    ]
    rows = {row[0]: row[1:] for row in summary(rounds)}
    assert rows[OURS][:3] == ["1.000", "0.500 to 2.000", "0.50"]
    assert rows[DEEPSPEED][2] == "2.00" and rows[RAW][2] == "1.00"
    said = verdict(rounds)
    assert said["DeepSpeed's save stops training"].startswith("4.0 times as long as ours; 8.0 times")
    assert said["DeepSpeed writes"] == "3.00 times the bytes"


@pytest.mark.slow
def test_every_contestant_saves_the_state_of_two_ranks(tmp_path: Path) -> None:
    """Ours is the raw bytes and a few descriptions; DeepSpeed's own adds the frozen weights."""
    words = ["--ranks", "2", "--hidden", "128", "--blocks", "4", "--new-blocks", "1", "--length", "16", "--rounds", "1"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "benchmarks.checkpoint", *words, "--results", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=clean, check=True, timeout=300)
    found = orjson.loads((tmp_path / "checkpoint.json").read_bytes())["found"]
    written = {name: one["bytes"] for name, one in found["rounds"][0].items()}
    assert written[RAW] == 4 * FLOAT32_STATES * found["trainable"]
    assert abs(written[OURS] - written[AT_ONCE]) < 10, "but for the digits of a number of steps"
    assert written[RAW] < written[OURS] < 1.1 * written[RAW] + 1e5
    frozen_bytes = 2 * (found["all"] - found["trainable"])
    assert written[DEEPSPEED] - written[WITHOUT_FROZEN] == pytest.approx(frozen_bytes, rel=0.1)
    assert "DeepSpeed without frozen" in (tmp_path / "checkpoint.md").read_text()
