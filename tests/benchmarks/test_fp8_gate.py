"""The gate's command: two real runs of a tiny model, exported and judged."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from benchmarks import fp8_gate
from llamapro.errors import EXIT_CHECK_FAILED
from llamapro.expansion.expand import expand
from tests.support.models import save_tiny_llama
from tests.support.texts import LAW, WIKI, write_text_dataset

STEPS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run configuration on real text, and the folder where the gate works."""
    folder = tmp_path_factory.mktemp("gate")
    save_tiny_llama(folder / "base", dtype=torch.bfloat16)
    expand(str(folder / "base"), folder / "expanded", new_blocks=2)
    write_text_dataset(folder / "law", folder / "base", heldout=LAW * 8, train=LAW * 16)
    write_text_dataset(folder / "wiki", folder / "base", heldout=WIKI * 8, train=WIKI * 16)
    values: dict[str, Any] = {
        "run": {"folder": str(folder / "elsewhere")},
        "model": {"path": str(folder / "expanded")},
        "data": {
            "sequence_length": 64,
            "sources": {name: {"path": str(folder / name), "weight": 0.5} for name in ("law", "wiki")},
        },
        "validation": {"every_steps": STEPS, "sequences": 2},
        "batch": {"global_sequences": 8, "micro_sequences": 4},
        "schedule": {"steps": STEPS, "learning_rate": 2e-3},
        "engine": {"zero_stage": 3},
        "logging": {"trackers": []},
    }
    (folder / "run.yaml").write_bytes(orjson.dumps(values))
    return folder


def gate(work: Path, *more: str) -> int:
    places = ["--config", str(work / "run.yaml"), "--work", str(work / "gate"), "--results", str(work / "results")]
    return fp8_gate.main([*places, *more])


def test_the_page_has_every_option_and_a_command_that_parses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fp8.md").read_text()
    options = {option for action in fp8_gate._parser()._actions for option in action.option_strings}
    assert {option for option in options - {"-h", "--help", "--debug"} if option not in page} == set()
    command = re.findall(r"python -m benchmarks\.fp8_gate (.*)", page)[0]
    own, overrides = fp8_gate._parser().parse_known_args(command.split())
    assert own.ranks == 8 and overrides == ["--schedule.steps", "200"]
    words = fp8_gate.train_command(own, overrides, Path("run"), fp8_gate.FP8)
    assert words[1:3] == ["--num_gpus", "8"] and "--engine.precision fp8-frozen" in " ".join(words)


def test_both_runs_are_trained_and_judged_in_bf16(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert gate(work, "--bound", "0.05") == 0
    output = capfd.readouterr()
    assert "FP8 codes and scales of frozen weights equal their values at the start" in " ".join(output.err.split())
    content = orjson.loads((work / "results" / "fp8-gate.json").read_bytes())
    assert len(content["losses"]["bf16"]) == len(content["losses"]["fp8-frozen"]) == STEPS
    assert content["losses"]["bf16"] != content["losses"]["fp8-frozen"]
    assert [verdict["text"] for verdict in content["verdicts"]] == ["law", "wiki"]
    for verdict in content["verdicts"]:
        assert verdict["bf16"] < verdict["untrained"] and verdict["kept_gain"] > 0.9
        assert f"loss {verdict['judged']:.4f} against {verdict['bf16']:.4f} trained in bf16" in output.out
    monkeypatch.setattr(fp8_gate, "_trained", lambda own, overrides, work, precision: work / f"{precision}-export")
    assert gate(work, "--bound", "-0.5") == EXIT_CHECK_FAILED
    assert "not shown to be within -50.00%" in capfd.readouterr().err
