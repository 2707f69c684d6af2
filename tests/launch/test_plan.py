"""The plan, the recipe and the commands agree with each other before anything is downloaded."""

import argparse
import importlib
from pathlib import Path

import pytest

from launch.quickstart import plan
from launch.quickstart.plan import DOMAIN, GENERAL, LAUNCH, Machine, Places, quickstart_steps
from llamapro.config.load import load_config
from llamapro.experiments.steps import Step

RECIPE = LAUNCH / "recipes" / "quickstart.yaml"
PLACES = Places(Path("work/quickstart"), Path("work/quickstart"))
MACHINE = Machine(2, has_gpu=False, environment={})


def commands(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int | None) -> list[list[str]]:
    """Every command line of the plan, recorded instead of run."""
    recorded: list[list[str]] = []

    def record(command: list[str], environment: dict[str, str]) -> str:
        recorded.append(command)
        return ""

    monkeypatch.setattr(plan, "run_command", record)
    monkeypatch.setattr(plan, "output_of", record)
    for step in quickstart_steps(Places(folder, folder), MACHINE, steps):
        if step.name not in ("fetch", "corpora"):
            step.work()
    return recorded


@pytest.mark.parametrize("steps", [None, 4])
def test_every_command_parses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int | None) -> None:
    seen = set()
    for command in commands(monkeypatch, tmp_path, steps):
        if command[1:3] == ["-m", "llamapro"]:
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"llamapro.cli.{command[3]}").add_arguments(parser)
            parser.parse_args(command[4:])
            seen.add(command[3])
    assert seen == {"data", "expand", "evaluate", "export", "verify", "report"}


@pytest.mark.parametrize("steps", [None, 4])
def test_training_reads_the_recipe_and_its_overrides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int | None
) -> None:
    (command,) = (line for line in commands(monkeypatch, tmp_path, steps) if Path(line[0]).name == "deepspeed")
    start = command.index("--config")
    assert command[start - 1] == str(LAUNCH / "pretrain.py")
    config = load_config(Path(command[start + 1]), command[start + 2 :])
    assert config.run.folder == tmp_path / "run"
    assert steps is None or config.schedule.steps == steps


def test_the_recipe_trains_on_what_the_plan_makes() -> None:
    config = load_config(RECIPE, [])
    assert config.model.path == PLACES.expanded
    assert {name: source.path for name, source in config.data.sources.items()} == {
        name: PLACES.dataset(name) for name in (DOMAIN, GENERAL)
    }
    assert config.run.folder == PLACES.run
    assert config.engine.zero_stage == 3


def test_a_short_run_shares_the_materials_and_nothing_else() -> None:
    short = Places(PLACES.root, PLACES.root / "short-4")
    whole, part = quickstart_steps(PLACES, MACHINE, None), quickstart_steps(short, MACHINE, 4)
    shared = [one.name for one, other in zip(whole, part, strict=True) if one.outputs == other.outputs]
    assert shared == ["fetch", "base", "corpora", f"dataset-{DOMAIN}", f"dataset-{GENERAL}", "expand"]
    for one, other in zip(whole, part, strict=True):
        assert (one.stamps == other.stamps) == (one.name in shared)


def test_steps_come_after_those_that_they_need() -> None:
    earlier: dict[str, Step] = {}
    for step in quickstart_steps(PLACES, MACHINE, None):
        assert all(earlier[needed.name] is needed for needed in step.after)
        assert step.name not in earlier
        earlier[step.name] = step
