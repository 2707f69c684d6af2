"""Experiments on tiny models without training: the fronts' place is taken by noise on whatever should learn."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from llamapro.cli import evaluate
from llamapro.cli.main import main
from llamapro.config.load import dump_config, load_config
from llamapro.config.root import RunConfig
from llamapro.errors import CheckFailed
from llamapro.evaluation.benchmarks.store import BenchmarkResults, MetricResult, TaskResult, write_benchmarks
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.experiments import chain
from llamapro.ranks import Ranks
from llamapro.training.environment import describe_environment
from tests.support.exports import block_of, step_line, tensors_of, write_checkpoint
from tests.support.models import save_tiny_llama
from tests.support.texts import LAW, WIKI, write_text_dataset


class Commands:
    """Takes the place of `run_command`: public commands run in this process, training adds noise of the rate's size.

    Attributes:
        said: what was run, e.g. "expand", "pretrain blocks 1".
        configurations: of every training.
        faults: raised instead of a training whose run folder has this text in it.
        accuracies: what the next evaluations of benchmarks say, by task; the base's are 0.25.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.configurations: list[RunConfig] = []
        self.faults: dict[str, Exception] = {}
        self.accuracies: list[dict[str, float]] = []

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        words = list(map(str, command))
        if words[1:3] == ["-m", "llamapro"]:
            self.said.append(words[3])
            if "--tasks" in words:
                pretend_to_score(words[4:], self.accuracies.pop(0))
                return
            if code := main(words[3:]):
                raise CheckFailed(f"{words[3]} ended with {code}")
            return
        config = load_config(Path(words[-1]))
        folder = config.run.folder
        self.said.append(f"{Path(words[1]).stem} {folder.parts[-3]} {config.run.seed}")
        for text, fault in self.faults.items():
            if text in str(folder):
                raise fault
        self.configurations.append(config)
        pretend_to_train(config)


def pretend_to_score(words: list[str], accuracies: dict[str, float]) -> None:
    """What `llamapro evaluate --tasks` writes about benchmarks."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    evaluate.add_arguments(parser)
    arguments = parser.parse_args(words)
    assert [name.partition(":")[0] for name in arguments.tasks] == list(accuracies)
    arguments.output.mkdir(exist_ok=True)
    results = BenchmarkResults(
        settings={"limit": arguments.limit},
        versions={"lm_eval": "0"},
        model_name=arguments.model,
        model={name: _task(value) for name, value in accuracies.items()},
        base_name=arguments.compare,
        base={name: _task(0.25) for name in accuracies},
    )
    write_benchmarks(arguments.output, results)


def _task(value: float) -> TaskResult:
    metric = MetricResult(value=value, half_width=None, higher_is_better=True)
    return TaskResult(tasks=1, items=9, shots=None, metric="acc,none", metrics={"acc,none": metric})


def pretend_to_train(config: RunConfig) -> None:
    """A run folder as a finished run leaves it: what should learn is the model's weights and noise."""
    folder, record = config.run.folder, read_record(config.model.path)
    assert config.schedule.steps != "auto"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(config.run.seed)
    masters = {
        name: tensor + config.schedule.learning_rate * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors_of(config.model.path).items()
        if _learns(config, record, name)
    }
    write_checkpoint(folder, masters, record, config.schedule.steps)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_bytes(orjson.dumps(describe_environment(Ranks.solo())))
    lines = [step_line(step) for step in range(1, config.schedule.steps + 1)]
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def _learns(config: RunConfig, record: ExpansionRecord | None, name: str) -> bool:
    if config.model.trainable == "all":
        return True
    assert config.model.trainable == "new" and record is not None
    return block_of(record, name) in record.new_blocks


def use(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Let experiments run these commands."""
    commands = Commands()
    monkeypatch.setattr(chain, "run_command", commands)
    return commands


def prepare(folder: Path) -> Path:
    """A base and two text datasets in `folder`."""
    save_tiny_llama(folder / "base")
    write_text_dataset(folder / "law", folder / "base", LAW, train=LAW)
    write_text_dataset(folder / "wiki", folder / "base", WIKI, train=WIKI)
    return folder


def ablation_values(inputs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """An ablation of four steps with two variants and two seeds on what `prepare` made."""
    values: dict[str, Any] = {
        "folder": str(folder),
        "base": str(inputs / "base"),
        "budget_tokens": 1024,
        "seeds": [1, 2],
        "data": {"sequence_length": 64, "sources": {"law": {"path": str(inputs / "law"), "weight": 1.0}}},
        "batch": {"global_sequences": 4},
        "engine": {"precision": "float32"},
        "evaluation": {"domain": {"law": str(inputs / "law")}, "general": {"wiki": str(inputs / "wiki")}},
        "variants": {
            "blocks": {"expand": {"new_blocks": 2}, "learning_rate": 0.02},
            "full": {"full": {}, "learning_rate": 0.01},
        },
    }
    return values | changes


def trace_values(inputs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two tasks, two methods, one seed."""
    values: dict[str, Any] = {
        "folder": str(folder),
        "base": str(inputs / "base"),
        "tokens_per_task": 512,
        "seeds": [1],
        "sequence_length": 64,
        "batch": {"global_sequences": 4},
        "engine": {"precision": "float32"},
        "tasks": {"first": {"data": str(inputs / "law")}, "second": {"data": str(inputs / "wiki"), "stage": "sft"}},
        "methods": {
            "blocks": {"expand": {"new_blocks": 2}, "learning_rate": 0.02},
            "sequential": {"full": {}, "learning_rate": 0.01},
        },
    }
    return values | changes


def write_values(folder: Path, values: dict[str, Any]) -> Path:
    """The configuration as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "experiment.yaml"
    file.write_bytes(orjson.dumps(values))
    return file
