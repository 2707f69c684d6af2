"""One small experiment for real: every process is started as a user would, an interrupt continues, LoRA takes part."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from tests.support.experiments import ablation_values, prepare, write_values
from tests.support.source import ROOT

TIMEOUT_SECONDS = 900


def start(file: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "llamapro", "experiment", "ablation", "--config", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_expansion_and_adapters_for_real_with_an_interrupt_between(tmp_path: Path) -> None:
    prepare(tmp_path)
    variants = {
        "blocks": {"expand": {"new_blocks": 2}, "learning_rate": 0.01},
        "lora": {"lora": {"rank": 4, "alpha": 4}, "learning_rate": 0.01},
    }
    values = ablation_values(tmp_path, tmp_path / "out", seeds=[1], variants=variants, batch={"global_sequences": 1})
    file = write_values(tmp_path, values)
    first = start(file)
    metrics = tmp_path / "out/runs/blocks/seed-1/pretrain/metrics.jsonl"
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (metrics.is_file() and '"step":2,' in metrics.read_text()):
        assert time.monotonic() < end and first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=TIMEOUT_SECONDS)
    assert first.returncode == 75, said
    second = start(file)
    said, _ = second.communicate(timeout=TIMEOUT_SECONDS)
    assert second.returncode == 0, said
    found = orjson.loads((tmp_path / "out" / "ablation.json").read_bytes())
    for name in ("blocks", "lora"):
        assert found["rows"][name]["domain"]["mean"] < 0, "16 steps on the same nine documents teach something"
    assert found["rows"]["blocks"]["parameters"] > found["rows"]["lora"]["parameters"] > 0
    assert found["rows"]["blocks"]["tokens"] == found["rows"]["lora"]["tokens"]
