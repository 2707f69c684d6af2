"""docs/retention.md is true to the programs: every command and configuration on it is understood."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from llamapro.config.availability import unavailable_settings
from llamapro.config.load import load_config
from tests.support.config import write_config
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "retention.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    llamapro ")]
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_shows_each_tool() -> None:
    assert len(COMMANDS) == 6 and len(BLOCKS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"llamapro.cli.{words[1]}").add_arguments(parser)
    assert vars(parser.parse_args(words[2:]))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_configuration_is_accepted(block: str, tmp_path: Path) -> None:
    sources = "" if "data:" in block else "data: {sources: {wiki: {path: data/wiki, weight: 1.0}}}\n"
    config = load_config(write_config(tmp_path, f"model: {{path: model}}\n{sources}{block}"))
    assert unavailable_settings(config) == []
