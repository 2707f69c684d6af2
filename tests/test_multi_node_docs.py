"""The page about several hosts is true: its commands parse, its plan is the planner's, what it names exists."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import orjson
import pytest

from llamapro.cli.main import main
from tests.cli.test_plan import LLAMA2_7B, cells
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "multi-node.md").read_text()
BILLION_TOKENS = 15_900 * 1024 * 4096 / 1e9


def commands() -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def planned() -> dict[int, list[str]]:
    """Rows of the table of plans, by number of GPUs."""
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    return {int(gpus): cells.split(" | ") for gpus, cells in rows}


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "llamapro":
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"llamapro.cli.{words[1]}").add_arguments(parser)
        parser.parse_args(words[2:])
        return
    from deepspeed.launcher import runner  # type: ignore[import-untyped]

    options = words[1:] if words[0] == "deepspeed" else words[3:]
    assert words[0] == "deepspeed" or words[:3] == ["python", "-m", "launch.hosts"]
    parsed = runner.parse_args(options)
    assert (ROOT / parsed.user_script).is_file() and parsed.hostfile == "hosts"


@pytest.mark.parametrize("gpus", [1, 8, 16, 64])
def test_the_plan_is_the_planners(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "path" / "to" / "llama2-7b").mkdir(parents=True)
    (tmp_path / "path" / "to" / "llama2-7b" / "config.json").write_bytes(orjson.dumps(LLAMA2_7B))
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in commands() if f"--gpus {gpus} " in line]
    assert main(shlex.split(command)[1:]) == 0
    shown = capsys.readouterr().out
    rows = ("ZeRO stage", "micro-batch, sequences", "memory per GPU, GiB", "tokens/s per GPU", "GPU-hours")
    *plan, days = planned()[gpus]
    assert [cells(shown, row)[0] for row in rows] == plan
    assert f"{float(plan[-1].replace(',', '')) * BILLION_TOKENS / gpus / 24:.1f}" == days


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert links and all((ROOT / "docs" / link).exists() for link in links)


def test_every_setting_it_names_exists() -> None:
    from llamapro.config.root import RunConfig

    for section, name in re.findall(r"`(engine|run|batch)\.([a-z_]+)`", PAGE):
        assert name in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_hpz_and_mics_are_off_at_every_stage() -> None:
    for stage in (1, 2, 3):
        values = orjson.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_bytes())
        zero = values["zero_optimization"]
        assert zero.get("zero_hpz_partition_size", 1) == 1
        assert not [name for name in zero if name.startswith("mics")]
