"""docs/evaluation.md is true to the programs: every command on it is understood, every name on it exists."""

import argparse
import re
import shlex
from importlib import import_module

import pytest

from llamapro.evaluation.benchmarks.tasks import TASK_FILES
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
COMMANDS = [line.partition("llamapro ")[2] for line in LINES if "llamapro evaluate" in line]


def test_the_page_shows_texts_benchmarks_processes_and_conversations() -> None:
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"llamapro.cli.{words[0]}").add_arguments(parser)
    assert vars(parser.parse_args(words[1:]))


def test_every_task_of_this_package_is_named_and_every_test_exists() -> None:
    assert {path.stem for path in TASK_FILES.glob("*.yaml") if path.stem not in PAGE} == {"gsm8k_pot"}
    for path in re.findall(r"tests/\S+\.py", PAGE):
        assert (ROOT / path).is_file()
