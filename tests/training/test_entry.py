"""The training command as a process: errors before anything starts, kills, stop requests, finished runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.training import losses, prepare, settings, state_digest

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("entry"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """A finished run of one process."""
    done = run(folder, settings(folder, "straight"))
    assert done.returncode == 0, done.stderr
    return folder / "straight"


def command(folder: Path, values: dict[str, Any], *more: str) -> list[str]:
    config = folder / f"{Path(values['run']['folder']).name}.yaml"
    config.write_bytes(orjson.dumps(values))
    return [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *more]


def run(folder: Path, values: dict[str, Any], *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, values, *more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(**variables),
        check=False,
    )


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "PYTHONPATH": str(ROOT), **variables}


def start(folder: Path, values: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(command(folder, values), stderr=subprocess.PIPE, text=True, env=environment())


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came; the process said:\n{''.join(seen)}")


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (run_folder / "metrics.jsonl").read_bytes().splitlines()]


def test_a_finished_run_exits_0_at_once_and_changes_nothing(folder: Path, straight: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    again = run(folder, settings(folder, "straight"))
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before


def test_the_run_folder_says_what_ran(straight: Path) -> None:
    assert "sequence_length: 64" in (straight / "config.yaml").read_text()
    assert "launch/pretrain.py" in (straight / "command.txt").read_text()
    assert {"torch", "deepspeed"} <= set(orjson.loads((straight / "environment.json").read_bytes())["packages"])
    assert (straight / "latest").read_text().strip() == "step-00000008"


def test_killed_and_started_again_gives_the_same_losses_and_weights(folder: Path, straight: Path) -> None:
    values = settings(folder, "killed")
    process = start(folder, values)
    wait_for(process, "step 6/8")
    process.kill()
    process.wait(TIMEOUT_SECONDS)
    resumed = run(folder, values)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step 4" in resumed.stderr
    assert losses(metrics(folder / "killed")) == losses(metrics(straight))
    assert state_digest(folder / "killed") == state_digest(straight)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_and_ends_with_75(folder: Path, straight: Path, how: str) -> None:
    values = settings(folder, f"asked-{how}")
    process = start(folder, values)
    wait_for(process, "step 2/8")
    process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert run(folder, values).returncode == 0
    assert losses(metrics(Path(values["run"]["folder"]))) == losses(metrics(straight))


def test_the_stop_command_makes_it_save_and_end_with_75(folder: Path) -> None:
    values = settings(folder, "told", schedule={"steps": 2000}, validation={"every_steps": 2000, "sequences": 5})
    process = start(folder, values)
    wait_for(process, " 2/2000")
    told = subprocess.run(
        [sys.executable, "-m", "llamapro", "stop", str(folder / "told")], env=environment(), check=False
    )
    assert told.returncode == 0
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, errors
    assert "STOP" in errors
    assert any(line.get("event") == "save" for line in metrics(folder / "told"))


def test_stop_after_minutes_ends_with_75(folder: Path) -> None:
    values = settings(folder, "timed")
    values["run"]["stop_after_minutes"] = 1e-6
    done = run(folder, values)
    assert done.returncode == 75, done.stderr
    assert "run.stop_after_minutes are over" in done.stderr


def test_every_mistake_is_said_at_once_before_anything_starts(folder: Path) -> None:
    values = settings(folder, "mistaken")
    values["data"]["sequence_length"] = 4096
    values["model"]["trainable"] = [1, 2]
    values["engine"]["precision"] = "bf16"
    done = run(folder, values)
    assert done.returncode == 2
    for key in ("data.sequence_length", "model.trainable", "engine.precision"):
        assert f"- {key}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "mistaken").exists()


def test_a_mistyped_key_names_the_nearest_one(folder: Path) -> None:
    done = run(folder, settings(folder, "typo"), "--schedule.learning_rat", "1e-3")
    assert done.returncode == 2 and "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_said_by_rank_0_only(folder: Path) -> None:
    values = settings(folder, "silent", schedule={"steps": -1})
    other = run(folder, values, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert other.returncode == 2
    assert "schedule" not in other.stderr


def test_help_shows_the_files_values(folder: Path) -> None:
    done = run(folder, settings(folder, "help"), "--help")
    assert done.returncode == 0
    assert "--batch.global-sequences" in done.stdout.replace("_", "-")
    assert "7" in done.stdout


def test_a_run_folder_in_use_is_refused_naming_its_owner(folder: Path) -> None:
    values = settings(folder, "shared")
    process = start(folder, values)
    wait_for(process, "step 1/8")
    process.send_signal(signal.SIGSTOP)
    second = run(folder, values)
    process.kill()
    process.wait(TIMEOUT_SECONDS)
    assert second.returncode == 75
    assert f"process {process.pid}" in second.stderr


def test_a_changed_seed_is_refused_on_resume(folder: Path, straight: Path) -> None:
    values = settings(folder, "straight")
    values["run"]["seed"] = 8
    values["schedule"]["steps"] = 9
    done = run(folder, values)
    assert done.returncode == 2
    assert "run.seed" in done.stderr and "schedule.steps" in done.stderr and "start_from" in done.stderr


@pytest.mark.parametrize("where", ["end", "middle"])  # a fresh new block and a base block
def test_a_flipped_byte_in_the_model_is_refused_naming_the_tensor(tmp_path: Path, where: str) -> None:
    folder = prepare(tmp_path)
    weights = folder / "expanded" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10 if where == "end" else -200_000] ^= 1
    weights.write_bytes(data)
    done = run(folder, settings(folder, "flipped"))
    assert done.returncode == 1, done.stderr
    assert "model.layers." in done.stderr and "Traceback" not in done.stderr
