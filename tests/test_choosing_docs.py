"""The page about choosing is true: its commands parse, the files and settings that it names exist."""

import re

import pytest

from llamapro.config.load import load_config
from llamapro.config.root import RunConfig
from tests.support.source import ROOT
from tests.test_readme import parse

PAGE = (ROOT / "docs" / "choosing.md").read_text()


def commands() -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    parse(command)


def test_files_that_it_names_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGE) if "://" not in link]
    named = re.findall(r"(launch/[\w/.-]+\.yaml)", PAGE)
    assert links and named
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_settings_that_it_names_exist() -> None:
    named = re.findall(r"`(model|guards|objective|schedule)\.([a-z_]+)", PAGE)
    assert len(named) >= 4
    for section, name in named:
        assert name in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_rates_of_recipes_are_those_of_the_page() -> None:
    for recipe, row in (("quickstart", "SmolLM2, 135M"), ("llama-pro-8b", "LLaMA 2, 7B")):
        rate = load_config(ROOT / "launch" / "recipes" / f"{recipe}.yaml").schedule.learning_rate
        (shown,) = re.findall(rf"^\| {row} \| ([0-9.e-]+)", PAGE, re.MULTILINE)
        assert float(shown) == rate


def test_readme_leads_here() -> None:
    assert "[docs/choosing.md](docs/choosing.md)" in (ROOT / "README.md").read_text()
