"""A sequence of tasks: each method continues with its own model, and the matrix holds what was measured."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from llamapro.cli.main import main
from tests.support.experiments import Commands, trace_values, write_values


def experiment(folder: Path, values: dict[str, Any]) -> int:
    return main(["experiment", "trace", "--config", str(write_values(folder, values))])


def test_each_method_goes_from_task_to_task_with_its_own_model(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    assert experiment(tmp_path, trace_values(inputs, tmp_path / "out")) == 0
    trained = [f"{front} {method} 1" for method in ("blocks", "sequential") for front in FRONTS]
    assert [said for said in commands.said if said.endswith(" 1")] == trained
    first, second, third, fourth = commands.configurations
    runs = tmp_path / "out" / "runs"
    assert second.model.path == runs / "blocks" / "seed-1" / "first.model"
    assert (third.model.path, fourth.model.path) == (inputs / "base", runs / "sequential" / "seed-1" / "first.model")
    assert [config.model.trainable for config in commands.configurations] == ["new", "new", "all", "all"]
    assert {config.schedule.steps for config in commands.configurations} == {2}
    assert [list(config.data.sources) for config in (first, second)] == [["first"], ["second"]]
    assert list((tmp_path / "out").rglob("*.safetensors")) == []


FRONTS = ("pretrain", "sft")


def test_matrix_and_its_summaries(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    assert experiment(tmp_path, trace_values(inputs, tmp_path / "out")) == 0
    found = orjson.loads((tmp_path / "out" / "trace.json").read_bytes())
    for learned in found["learned"]:
        files = [
            tmp_path / "out" / "runs" / learned["method"] / "seed-1" / f"{task}.measured.json"
            for task in ("first", "second")
        ]
        measured = [orjson.loads(file.read_bytes())["texts"]["model"]["sets"] for file in files]
        matrix = np.array([[-sets[task]["bits_per_byte"] for task in ("first", "second")] for sets in measured])
        assert np.array(learned["scores"]) == pytest.approx(matrix)
        row = found["rows"][learned["method"]]
        assert row["overall"]["mean"] == pytest.approx(matrix[1].mean())
        assert row["transfer"]["mean"] == pytest.approx((matrix[1, 0] - matrix[0, 0]) / 2)
    assert all(score < 0 for score in found["base"]), "bits per byte with a minus: higher is better"
    page = (tmp_path / "out" / "trace.md").read_text()
    assert "## sequential" in page and "| after second |" in page and "minus the bits per byte" in page
    assert (tmp_path / "out" / "trace.svg").read_text().startswith("<svg")


def test_a_finished_sequence_is_only_read(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    values = trace_values(inputs, tmp_path / "out")
    assert experiment(tmp_path, values) == 0
    commands.said.clear()
    assert experiment(tmp_path, values) == 0
    assert commands.said == []


def test_a_change_of_a_later_task_keeps_nothing_that_depends_on_it(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    values = trace_values(inputs, tmp_path / "out", keep=True)
    assert experiment(tmp_path, values) == 0
    commands.said.clear()
    values["tasks"]["second"]["stage"] = "pretrain"
    assert experiment(tmp_path, values) == 0
    assert [said for said in commands.said if said.endswith(" 1")] == ["pretrain blocks 1", "pretrain sequential 1"]


def test_benchmarks_are_scores_as_they_are(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    values = trace_values(inputs, tmp_path / "out", methods={"sequential": {"full": {}}})
    values["tasks"]["first"]["benchmark"], values["tasks"]["second"]["benchmark"] = "arc_easy:5", "piqa"
    values["evaluation"] = {"limit": 9}
    commands.accuracies = [{"arc_easy": 0.75, "piqa": 0.5}, {"arc_easy": 0.5, "piqa": 1.0}]
    assert experiment(tmp_path, values) == 0
    found = orjson.loads((tmp_path / "out" / "trace.json").read_bytes())
    assert found["base"] == [0.25, 0.25]
    assert found["learned"][0]["scores"] == [[0.75, 0.5], [0.5, 1.0]]
    assert found["rows"]["sequential"]["overall"]["mean"] == 0.75
    assert found["rows"]["sequential"]["transfer"]["mean"] == (0.5 - 0.75) / 2
    assert "benchmark" in found["score"]
