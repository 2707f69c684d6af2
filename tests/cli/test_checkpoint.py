"""`llamapro checkpoint ls|verify|prune RUN` on a run folder with real checkpoints."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.cli.main import main
from llamapro.errors import EXIT_CHECK_FAILED, EXIT_USAGE
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from tests.support.checkpoint import save_solo
from tests.support.config import minimal_values


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 30, 40):
        save_solo(folder.checkpoints, step, seed=step)
    configure(folder)
    return folder


def configure(folder: RunFolder, **sections: Any) -> None:
    """What the run was started with."""
    folder.config_file.write_bytes(orjson.dumps(minimal_values(**sections)))


def steps_left(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.checkpoints.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_shows_the_newest_first_and_marks_the_latest(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "step-" in line]
    assert [line.split()[0] for line in lines] == [f"step-000000{step}" for step in (40, 30, 20, 10)]
    assert ["latest" in line for line in lines] == [True, False, False, False]
    assert all("complete" in line for line in lines)


def test_ls_of_a_run_without_checkpoints(tmp_path: Path) -> None:
    RunFolder(tmp_path).config_file.write_text("run: {}\n")
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert main(["checkpoint", "verify", str(tmp_path)]) == EXIT_CHECK_FAILED


def test_verify_passes_and_finds_one_flipped_bit(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run.path)]) == 0
    assert capsys.readouterr().out.count("verified") == 4
    flip(run.checkpoints / "step-00000020" / "rank-00000.safetensors")
    assert main(["checkpoint", "ls", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run.path)]) == EXIT_CHECK_FAILED
    out = capsys.readouterr().out
    assert out.count("verified") == 3 and "differs" in out
    assert (run.checkpoints / "step-00000020").is_dir(), "verify changes nothing"


def test_prune_keeps_what_it_is_told(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run.path), "--keep", "1", "--keep-every-steps", "20"]) == 0
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000020", "step-00000040"]
    assert capsys.readouterr().out.count("deleted") == 2
    assert main(["checkpoint", "prune", str(run.path)]) == 0
    assert "nothing to delete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "arguments", "left"),
    [
        ({}, [], [30, 40]),
        ({"keep": 3}, [], [20, 30, 40]),
        ({"keep": 1, "keep_every_steps": 20}, [], [20, 40]),
        ({"keep": 3, "keep_every_steps": 20}, ["--keep", "1", "--keep-every-steps", "30"], [30, 40]),
    ],
)
def test_prune_keeps_what_the_run_keeps_unless_told_otherwise(
    run: RunFolder, settings: dict[str, Any], arguments: list[str], left: list[int]
) -> None:
    configure(run, checkpoint=settings)
    assert main(["checkpoint", "prune", str(run.path), *arguments]) == 0
    assert steps_left(run) == left


@pytest.mark.parametrize(("spike", "left"), [("rollback", [40, 50]), ("skip", [50])])
def test_prune_spares_what_a_run_may_roll_back_to(run: RunFolder, spike: str, left: list[int]) -> None:
    """The newest checkpoint was saved at a stop, between two of the schedule."""
    configure(run, checkpoint={"every_steps": 20, "keep": 1}, guards={"spike": spike})
    save_solo(run.checkpoints, 50, seed=50)
    assert main(["checkpoint", "prune", str(run.path)]) == 0
    assert steps_left(run) == left


def test_prune_counts_on_no_checkpoint_with_a_flipped_bit(run: RunFolder) -> None:
    """Its size is right; deleting the sound ones before it would leave nothing to continue from."""
    flip(run.checkpoints / "step-00000040" / "rank-00000.safetensors")
    assert main(["checkpoint", "prune", str(run.path), "--keep", "1"]) == 0
    assert steps_left(run) == [30, 40]


def test_prune_deletes_nothing_of_a_run_whose_configuration_it_does_not_understand(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(run, guards={"spike": "sideways"})
    assert main(["checkpoint", "prune", str(run.path)]) == EXIT_USAGE
    assert "guards.spike" in capsys.readouterr().err and len(steps_left(run)) == 4


def test_what_was_set_aside_is_named_and_stays(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run.checkpoints / "step-00000040" / "rank-00000.safetensors")
    found = find_checkpoint(run.checkpoints, Ranks.solo())
    assert found is not None and found.step == 30
    capsys.readouterr()
    assert main(["checkpoint", "prune", str(run.path), "--keep", "1"]) == 0
    assert main(["checkpoint", "ls", str(run.path)]) == 0
    said = capsys.readouterr()
    assert "quarantine" not in said.out and f"{run.checkpoints / 'quarantine-step-00000040'} was set aside" in said.err
    assert (run.checkpoints / "quarantine-step-00000040").is_dir()


@pytest.mark.parametrize("action", ["ls", "verify"])
def test_json_says_the_same_for_programs(run: RunFolder, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-00000030" / "state.json").unlink()
    assert main(["checkpoint", action, str(run.path), "--json"]) == (EXIT_CHECK_FAILED if action == "verify" else 0)
    found = [orjson.loads(line) for line in capsys.readouterr().out.splitlines()]
    good = "verified" if action == "verify" else "complete"
    assert [(one["step"], one["state"], one["latest"]) for one in found] == [
        (40, good, True),
        (30, "damaged", False),
        (20, good, False),
        (10, good, False),
    ]
    assert "state.json is missing" in found[1]["problem"] and not found[0]["problem"]
    assert found[0]["checkpoint"] == str(run.checkpoints / "step-00000040") and found[0]["bytes"] > 1000


@pytest.mark.parametrize("arguments", [["--keep", "0"], ["--keep-every-steps", "0"]])
def test_prune_refuses_to_keep_nothing(
    run: RunFolder, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "prune", str(run.path), *arguments]) == EXIT_USAGE
    assert f"{arguments[0]} 0: give at least 1" in capsys.readouterr().err
    assert len(list(run.checkpoints.iterdir())) == 4


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(tmp_path)]) == EXIT_USAGE
    assert "is not a run folder" in capsys.readouterr().err
