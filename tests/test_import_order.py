"""Imports go one way: the table below is the architecture, and these tests hold it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import source
from tests.support.hidden import hide_package
from tests.support.source import Module, imports, loaded_with, modules

ORDER = (
    *("errors", "console", "files", "config", "run_folder", "ranks", "expansion", "data", "planning", "modeling"),
    *("engine", "checkpoint", "evaluation", "training", "export", "report", "experiments", "doctor", "cli"),
)
MUST_NOT_KNOW = {
    "expansion": {"ranks"},
    "modeling": {"ranks"},
    "checkpoint": {"engine"},
}
HEAVY = ("torch", "transformers", "deepspeed")
LIGHT_PARTS = ("errors", "console", "files", "config", "run_folder", "expansion", "data")
DATA_TOOLS_MAY_USE = {"errors", "console", "files", "data"}
FRONT_LINES = 40


def part_of(name: str) -> str | None:
    """The part of llamapro that a module belongs to; None for other packages and for `llamapro` itself."""
    words = name.split(".")
    return words[1] if words[0] == "llamapro" and len(words) > 1 else None


def upward_imports(module: Module, order: tuple[str, ...]) -> list[str]:
    """Imports of a part that stands after the module's own."""
    own = part_of(module.name)
    found = []
    for one in imports(module):
        target = part_of(one.target)
        if own in order and target in order and order.index(target) > order.index(own):
            found.append(f"{module.path}:{one.line}: {own} imports {one.target}")
    return found


def parts() -> dict[str, list[Module]]:
    grouped: dict[str, list[Module]] = {}
    for module in modules().values():
        if (part := part_of(module.name)) is not None:
            grouped.setdefault(part, []).append(module)
    return grouped


def test_every_part_has_its_place_in_the_order() -> None:
    assert set(parts()) - {"__main__"} <= set(ORDER)


def test_no_module_imports_a_part_above_its_own() -> None:
    assert [line for module in modules().values() for line in upward_imports(module, ORDER)] == []


def test_the_order_test_sees_an_upward_import(tmp_path: Path) -> None:
    text = "def late():\n    from llamapro.training.loop import run\n"
    bad = Module("llamapro.files.bad", tmp_path / "bad.py", ast.parse(text))
    assert len(upward_imports(bad, ORDER)) == 1


@pytest.mark.parametrize(("part", "unknown"), MUST_NOT_KNOW.items())
def test_part_knows_nothing_of(part: str, unknown: set[str]) -> None:
    known = {part_of(one.target) for module in parts().get(part, []) for one in imports(module)}
    assert not known & unknown


@pytest.mark.parametrize("part", LIGHT_PARTS)
def test_light_part_loads_without_torch_transformers_and_deepspeed(part: str) -> None:
    for module in parts().get(part, []):
        assert not {name.partition(".")[0] for name in loaded_with(module.name)} & set(HEAVY), module.name


def test_only_the_engine_imports_deepspeed() -> None:
    users = {
        module.name
        for module in modules().values()
        for one in imports(module)
        if one.target.partition(".")[0] == "deepspeed" and part_of(module.name) != "engine"
    }
    assert users == set()


def test_data_tools_uses_the_lowest_parts_only() -> None:
    for module in modules().values():
        if module.name.partition(".")[0] == "data_tools":
            used = {part_of(one.target) for one in imports(module)} - {None}
            assert used <= DATA_TOOLS_MAY_USE, module.name


def test_only_commands_import_data_tools_and_only_when_run() -> None:
    for module in modules().values():
        uses = [one for one in imports(module) if one.target.partition(".")[0] == "data_tools"]
        if uses and module.name.partition(".")[0] != "data_tools":
            assert part_of(module.name) == "cli", module.name
            assert all(one.lazy for one in uses), module.name


def test_the_library_never_imports_what_is_launched() -> None:
    for module in modules().values():
        if module.name.partition(".")[0] in ("llamapro", "data_tools"):
            assert not [one.target for one in imports(module) if one.target.startswith(("launch", "llamapro.launch"))]


def test_fronts_are_short() -> None:
    fronts = [module for module in modules().values() if module.path.parent == source.ROOT / "launch"]
    assert fronts
    assert all(module.lines < FRONT_LINES for module in fronts)


def without_deepspeed(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": f"{hide_package(folder, 'deepspeed')}:{source.ROOT}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("command", ["export", "evaluate", "expand", "verify"])
def test_command_loads_without_deepspeed(tmp_path: Path, command: str) -> None:
    done = without_deepspeed(tmp_path, f"from llamapro.cli.main import main; main(['{command}', '--help'])")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_engine_does_not_load_without_deepspeed(tmp_path: Path) -> None:
    done = without_deepspeed(tmp_path, "import llamapro.engine.engine")
    assert "No module named 'deepspeed'" in done.stderr
