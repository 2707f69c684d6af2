"""docs/retention.md is true to the programs: every command on it is understood."""

import argparse
import shlex
from importlib import import_module

import pytest

from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "retention.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    llamapro ")]


def test_the_page_shows_each_tool() -> None:
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"llamapro.cli.{words[1]}").add_arguments(parser)
    assert vars(parser.parse_args(words[2:]))
