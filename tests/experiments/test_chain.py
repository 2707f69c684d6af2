"""What a chain runs: every placement reaches `llamapro expand`, every launcher the training's front."""

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.engine.environment import cuda_possible
from llamapro.expansion.expand import expand
from llamapro.expansion.record import read_record
from llamapro.experiments.chain import front_command, launch_environment
from llamapro.experiments.config import LaunchConfig
from tests.support.experiments import ablation_values, prepare, use, write_values
from tests.support.texts import WIKI, write_text_dataset


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "settings",
    [
        {"new_blocks": 2, "placement": "prefix"},
        {"new_blocks": 2, "placement": "suffix"},
        {"new_blocks": 2, "placement": "0,2"},
        {"new_blocks": 2, "copies_per_group": 2},
    ],
)
def test_blocks_are_placed_as_the_expand_command_does(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    use(monkeypatch)
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], variants={"one": {"expand": settings}}, keep=True)
    assert main(["experiment", "ablation", "--config", str(write_values(tmp_path, values))]) == 0
    record = read_record(tmp_path / "out" / "runs" / "one" / "seed-1" / "pretrain.model")
    placement = settings.get("placement", "interleaved")
    where = [0, 2] if placement == "0,2" else placement
    asked = {"new_blocks": 2, "copies_per_group": settings.get("copies_per_group", 1), "placement": where}
    alone = expand(str(inputs / "base"), tmp_path / "alone", **asked)
    assert record is not None
    assert (record.new_blocks, record.source_blocks) == (alone.new_blocks, alone.source_blocks)


def test_importance_is_measured_on_the_probe(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    probe = write_text_dataset(tmp_path / "probe", inputs / "base", WIKI * 16)
    settings = {"new_blocks": 1, "placement": "importance", "probe": str(probe)}
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], variants={"one": {"expand": settings}}, keep=True)
    assert main(["experiment", "ablation", "--config", str(write_values(tmp_path, values))]) == 0
    (expansion,) = (tmp_path / "out" / "expanded").glob("*/expansion.json")
    request = orjson.loads(expansion.read_bytes())["request"]
    assert request["placement"] == "importance"
    assert request["importance"] is not None


def test_python_starts_one_process_of_the_front() -> None:
    command = front_command("sft", LaunchConfig(), Path("run.yaml"))
    assert command[0] == sys.executable and command[2:] == ["--config", "run.yaml"]
    front = Path(command[1])
    assert front.name == "sft.py" and 'main("sft")' in front.read_text()


def test_deepspeed_starts_as_many_as_asked_for() -> None:
    command = front_command("pretrain", LaunchConfig(launcher="deepspeed", processes=2), Path("run.yaml"))
    assert Path(command[0]).name == "deepspeed"
    assert command[command.index("--num_gpus") + 1] == "2"
    assert Path(command[-3]).name == "pretrain.py" and command[-2:] == ["--config", "run.yaml"]


def test_the_launcher_is_told_where_there_is_no_gpu() -> None:
    assert ("DS_ACCELERATOR" in launch_environment()) is not cuda_possible()
