"""`--dry-run` through the real command: the plan, one step at full shape, and nothing left behind."""

import resource
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.experiments.commands import deepspeed_command
from tests.support.training import prepare, settings
from tests.training.test_entry import TIMEOUT_SECONDS, command, environment, run

ADDRESS_SPACE = 6 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("dry"))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def cell(page: str, label: str) -> str:
    (line,) = [line for line in page.splitlines() if line.strip().startswith(label)]
    return line.split("│")[1].strip()


def test_two_ranks_take_a_step_under_the_launcher_and_leave_nothing(folder: Path) -> None:
    values = settings(folder, "two", engine={"zero_stage": 3})
    config = folder / "two.yaml"
    config.write_bytes(orjson.dumps(values))
    before = files(folder)
    launched = deepspeed_command(Path("launch/pretrain.py"), 2, "--config", config, "--dry-run")
    done = subprocess.run(launched, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment())
    assert done.returncode == 0, done.stderr
    assert "one step of 2 × 2 × 64 random tokens per rank" in done.stderr
    assert "one step on 2 ranks" in done.stdout
    assert float(cell(done.stdout, "peak memory measured").split()[0]) > 0
    assert float(cell(done.stdout, "tokens/s").replace(",", "").split()[0]) > 0
    assert done.stdout.count("hardware (HFU)") == 1  # one rank speaks
    assert files(folder) == before and not (folder / "two").exists()


def test_a_run_that_is_there_stays_as_it_is_even_while_it_is_locked(folder: Path) -> None:
    values = settings(folder, "there", schedule={"steps": 2}, checkpoint={"every_steps": 2})
    assert run(folder, values).returncode == 0
    before = files(folder / "there")
    assert before
    done = run(folder, values, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert cell(done.stdout, "seconds of the step")
    assert files(folder / "there") == before


def test_what_does_not_fit_is_said_with_what_to_change(folder: Path) -> None:
    large: dict[str, Any] = {"global_sequences": 32768, "micro_sequences": 32768}
    values = settings(folder, "large", batch=large, engine={"activation_memory_gib": "unlimited"})
    done = subprocess.run(
        command(folder, values, "--dry-run"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
    )
    assert done.returncode == 2, done.stderr
    assert "memory ran out in a step of 32768 × 64 tokens at ZeRO stage 1" in done.stderr
    assert "batch.micro_sequences: 16384" in done.stderr and "engine.activation_memory_gib: " in done.stderr
    assert "Traceback" not in done.stderr
