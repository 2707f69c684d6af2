"""What the tests of whole experiments start from: a base with two texts, and commands that only look as if they ran."""

from pathlib import Path

import pytest

from tests.support.experiments import Commands, prepare, use


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    return use(monkeypatch)
