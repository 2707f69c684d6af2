"""Measure models on benchmarks, each task once: what is stored is not measured again, an interrupted task goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.evaluator  # type: ignore[import-untyped]
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llamapro import console
from llamapro.evaluation.benchmarks.archive import ARCHIVE_SHA256
from llamapro.evaluation.benchmarks.crew import Arguments, Crew, KeptAnswers
from llamapro.evaluation.benchmarks.model import AskedModel
from llamapro.evaluation.benchmarks.plan import Line, Plan
from llamapro.evaluation.benchmarks.score import TaskScore, difference, task_score, together
from llamapro.evaluation.benchmarks.store import (
    BenchmarkResults,
    MetricResult,
    TaskChange,
    TaskKey,
    TaskResult,
    store_task,
    stored_task,
    write_benchmarks,
)
from llamapro.evaluation.benchmarks.suite import Benchmark
from llamapro.evaluation.benchmarks.tasks import no_bars
from llamapro.evaluation.measure import compute_dtype, program_versions
from llamapro.evaluation.model_digest import model_digest, words_digest
from llamapro.evaluation.verdict import verdict
from llamapro.files.atomic import remove_tree

ANSWERS = "answers"
HUB = "hub"


@dataclass(frozen=True)
class TaskSettings:
    """How to measure.

    Attributes:
        limit: items of each task at most, the first ones; None: all.
        chat: put prompts into the model's chat template, examples as turns.
        precision: "keep" (the folder's dtype), "bf16" or "float32".
        device: "cpu" or "cuda".
    """

    limit: int | None
    chat: bool
    precision: str
    device: str


def evaluate_benchmarks(
    crew: Crew,
    plan: Plan,
    model: tuple[str, Path],
    base: tuple[str, Path] | None,
    settings: TaskSettings,
    output: Path,
) -> BenchmarkResults:
    """Measure a model, and its base on the same items, and write `output`/benchmarks.json.

    Args:
        model: how the user named it, and its folder.
        base: the same for what it is compared with.

    Raises:
        ModelRefused: the weights are no floats.
        CheckFailed: a log-likelihood is not finite.
    """
    measured = _Measurement(crew, plan, settings, model[1], output).scores()
    against = _Measurement(crew, plan, settings, base[1], output).scores() if base else {}
    benchmarks = {line.benchmark.name: line for line in plan.lines}
    results = BenchmarkResults(
        settings={
            "items_from": ARCHIVE_SHA256 if plan.tasks.archive else HUB,
            "limit": settings.limit,
            "chat": settings.chat,
            "precision": settings.precision,
            "device": settings.device,
        },
        versions=benchmark_versions(),
        model_name=model[0],
        model={name: _result(benchmarks[name], score) for name, score in measured.items()},
        base_name=base[0] if base else None,
        base={name: _result(benchmarks[name], score) for name, score in against.items()},
        changes={name: _change(benchmarks[name], measured[name], score) for name, score in against.items()},
        absent=list(plan.absent),
    )
    write_benchmarks(output, results)
    return results


@dataclass
class _Measurement:
    """One model on every benchmark of a plan; loaded when the first measurement is missing."""

    crew: Crew
    plan: Plan
    settings: TaskSettings
    folder: Path
    store: Path

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.folder, self.settings.precision)
        self.digest = model_digest(self.folder)
        self.words_digest = words_digest(self.folder)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def scores(self) -> dict[str, TaskScore]:
        return {
            line.benchmark.name: together([self._score(line.benchmark, leaf) for leaf in line.leaves])
            for line in self.plan.lines
        }

    def _score(self, benchmark: Benchmark, leaf: str) -> TaskScore:
        key = self._key(benchmark, leaf)
        score = stored_task(self.store, key)
        return score if score is not None else self._measure(benchmark, leaf, key)

    def _measure(self, benchmark: Benchmark, leaf: str, key: TaskKey) -> TaskScore:
        with no_bars():
            task = self.plan.tasks.build(leaf, benchmark)
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.crew.load(self.folder, self.dtype)
        answers = self.store / ANSWERS / key.digest()

        def ask(kind: str, requests: Sequence[Arguments]) -> list[Any]:
            with console.progress(leaf, len(requests), "requests") as advance:
                return KeptAnswers(self.crew, answers, key.digest(), advance)(kind, requests)

        score = _evaluate(task, leaf, AskedModel(ask, self.tokenizer), self.settings)
        store_task(self.store, key, score)
        remove_answers(answers)
        return score

    def _key(self, benchmark: Benchmark, leaf: str) -> TaskKey:
        return TaskKey(
            model_digest=self.digest,
            words_digest=self.words_digest,
            task=leaf,
            items_from=ARCHIVE_SHA256 if self.plan.tasks.archive else HUB,
            shots=benchmark.shots,
            limit=self.settings.limit,
            chat=self.settings.chat,
            precision=self.dtype,
            device=self.settings.device,
            program=" ".join(f"{name} {number}" for name, number in benchmark_versions().items()),
        )


def _evaluate(task: Any, leaf: str, model: AskedModel, settings: TaskSettings) -> TaskScore:
    with no_bars():
        evaluated = lm_eval.evaluator.evaluate(
            lm=model,
            task_dict={"tasks": {leaf: task}},
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
        )
    return task_score(evaluated, leaf)


def remove_answers(folder: Path) -> None:
    """A finished task's chunks; with the last ones their parent."""
    if folder.is_dir():
        remove_tree(folder)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        remove_tree(folder.parent)


def benchmark_versions() -> dict[str, str]:
    """Versions of what decides a benchmark's measurement."""
    return program_versions() | {"lm-eval": version("lm-eval")}


def _result(line: Line, score: TaskScore) -> TaskResult:
    metrics = {}
    for name, metric in score.metrics.items():
        estimate = metric.estimate()
        metrics[name] = MetricResult(
            value=estimate.value, half_width=estimate.half_width, higher_is_better=metric.higher_is_better
        )
    return TaskResult(
        tasks=len(line.leaves),
        items=score.items,
        shots=score.shots,
        metric=shown_metric(line.benchmark, list(metrics)),
        metrics=metrics,
    )


def shown_metric(benchmark: Benchmark, metrics: Sequence[str]) -> str:
    """The metric that stands for a benchmark."""
    return next((name for name in metrics if name == (benchmark.metric or "acc_norm,none")), metrics[0])


def _change(line: Line, model: TaskScore, base: TaskScore) -> TaskChange:
    metric = shown_metric(line.benchmark, list(model.metrics))
    estimate = difference(model.metrics[metric], base.metrics[metric])
    return TaskChange(
        metric=metric,
        difference=estimate.value,
        half_width=estimate.half_width,
        verdict=verdict(estimate, higher_is_better=model.metrics[metric].higher_is_better),
    )
