"""docs/experiments.md is true to the program: its commands are understood, its configuration and files are there."""

import argparse
import re
import shlex
from pathlib import Path

from llamapro.cli import experiment
from llamapro.experiments.config import AblationConfig
from llamapro.experiments.load import load_experiment
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "experiments.md").read_text()
RECIPES = ROOT / "launch" / "recipes"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_commands_are_understood() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        parser = argparse.ArgumentParser(exit_on_error=False)
        experiment.add_arguments(parser)
        assert words[:2] == ["llamapro", "experiment"]
        parser.parse_args(words[2:])


def test_configuration_is_valid_and_its_budget_is_what_it_says(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "compare.yaml").write_text(text)
    config = load_experiment(tmp_path / "compare.yaml", AblationConfig)
    assert config.budget_tokens == 128 * config.step_tokens
    assert [variant.kinds for variant in config.variants.values()] == [["expand"], ["expand"], ["lora"], ["full"]]


def test_every_recipe_of_an_experiment_is_listed() -> None:
    listed = set(re.findall(r"^\| `([a-z0-9-]+\.yaml)` \|", PAGE, re.MULTILINE))
    assert listed == {file.name for file in RECIPES.glob("*.yaml") if "llamapro experiment" in file.read_text()}


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
