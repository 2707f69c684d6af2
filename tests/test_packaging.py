"""An installed copy has everything the repository has: configurations, recipes and launch files beside the library."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.source import ROOT, modules

SOURCES = ("llamapro", "data_tools", "launch", "ds_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel built from a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={out}",
    ]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    return set(zipfile.ZipFile(wheel).namelist())


def installed(path: Path) -> str:
    """Where a file of the repository lies in an installed copy."""
    name = str(path.relative_to(ROOT))
    return name if name.startswith(("llamapro/", "data_tools/")) else f"llamapro/{name}"


def test_every_module_is_in_the_wheel(wheel_names: set[str]) -> None:
    assert {installed(module.path) for module in modules().values()} <= wheel_names


def test_every_data_file_is_in_the_wheel(wheel_names: set[str]) -> None:
    files = [path for name in ("llamapro", "data_tools", "launch", "ds_configs") for path in (ROOT / name).rglob("*")]
    data = {installed(path) for path in files if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {"llamapro/ds_configs/zero3.json", "llamapro/launch/slurm/pretrain.sbatch", "llamapro/py.typed"} <= data
    assert data <= wheel_names


def test_no_name_outside_the_project_is_claimed(wheel_names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llamapro", "data_tools"}


def requirement_names(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=~!; ]", requirement, maxsplit=1)[0] for requirement in requirements}
    return {name.lower().replace("_", "-") for name in names} - {"llamapro"}


def test_what_the_makefile_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(name for extra in ("dev", "eval", "quickstart", "gguf", "fast", "mpi") for name in extras[extra]),
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=+ ]+", line) for line in pins), "a pin is no exact public version"
    assert requirement_names(wanted) <= requirement_names(pins)


def test_system_packages_are_named_once() -> None:
    files = ("apt-packages.txt", "apt-packages-cluster.txt")
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    assert len(lines) == len(set(lines))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", line) for line in lines)
