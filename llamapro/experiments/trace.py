"""Tasks learned one after another by several methods, with the same tokens for each task: who forgets what.

A method continues with its own result of the task before: new blocks go on learning, all weights go on learning, and
low-rank adapters are merged before new ones begin. Only the optimizer and the schedule begin anew with each task.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from llamapro.data.dataset import Dataset
from llamapro.evaluation.continual import backward_transfer, overall_performance
from llamapro.evaluation.model_digest import model_digest
from llamapro.experiments.chain import Chain, Evaluation, Measured, Phase, Place, make_chains
from llamapro.experiments.config import VariantConfig
from llamapro.experiments.evaluation_options import benchmark_options
from llamapro.experiments.load import open_inputs
from llamapro.experiments.pages import write_trace
from llamapro.experiments.results import Learned, MethodRow, TraceResults, spread
from llamapro.experiments.trace_config import TraceConfig
from llamapro.files.lock import RunLock

TEXT_SCORE = "minus the bits per byte of the task's held-out text"
BENCHMARK_SCORE = "the benchmark's main metric"


def run_trace(config: TraceConfig) -> TraceResults:
    """Learn all tasks with all methods and write trace.json, trace.md and trace.svg.

    Raises:
        ConfigError: the base or a dataset can't be used.
        CheckFailed: every method failed; if only some did, the results name them.
        RetryLater: interrupted; the same call continues.
    """
    datasets = _open(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    with RunLock(config.folder):
        place = Place(config.folder, config.base, model_digest(config.base), config.launch)
        chains = plan_chains(config, place, datasets)
        return make_chains(
            chains,
            keep=config.keep,
            results=lambda made, failed: _results(config, made, failed),
            write=lambda results: write_trace(config.folder, results),
        )


def plan_chains(config: TraceConfig, place: Place, datasets: Mapping[str, Dataset]) -> list[Chain]:
    """A chain for each seed and method, with a training and a measurement for each task."""
    evaluation = _evaluation(config, datasets)
    phases = {
        name: [_phase(config, task, method, datasets, evaluation) for task in config.tasks]
        for name, method in config.methods.items()
    }
    return [
        Chain(place, name, method, seed, phases[name])
        for seed in config.seeds
        for name, method in config.methods.items()
    ]


def _open(config: TraceConfig) -> dict[str, Dataset]:
    paths = {f"tasks.{name}.data": task.data for name, task in config.tasks.items()}
    measured = [f"tasks.{name}.data" for name, task in config.tasks.items() if task.benchmark is None]
    return open_inputs(config.base, paths, measured)


def _phase(
    config: TraceConfig,
    task: str,
    method: VariantConfig,
    datasets: Mapping[str, Dataset],
    evaluation: Evaluation,
) -> Phase:
    rate = method.learning_rate or config.schedule.learning_rate
    steps = config.tokens_per_task // config.step_tokens
    sections: dict[str, Any] = {
        "data": {
            "sequence_length": config.sequence_length,
            "packing": config.packing,
            "sources": {task: {"path": config.tasks[task].data, "weight": 1.0}},
        },
        "schedule": {**config.schedule.model_dump(), "steps": steps, "learning_rate": rate},
        **{name: getattr(config, name).model_dump() for name in ("batch", "optimizer", "engine")},
        "logging": {"every_steps": max(1, steps // 10)},
    }
    fingerprint = datasets[f"tasks.{task}.data"].fingerprint
    return Phase(task, config.tasks[task].stage, sections, None, fingerprint, evaluation)


def _evaluation(config: TraceConfig, datasets: Mapping[str, Dataset]) -> Evaluation:
    chosen = config.evaluation
    texts = {name: task.data for name, task in config.tasks.items() if task.benchmark is None}
    options = [word for name, path in texts.items() for word in ("--text", f"{name}={path}")]
    if texts:
        options += ["--sequences", str(chosen.sequences), "--sequence-length", str(config.sequence_length)]
    benchmarks = list(dict.fromkeys(task.benchmark for task in config.tasks.values() if task.benchmark is not None))
    options += benchmark_options(benchmarks, chosen.limit, chosen.task_data)
    return Evaluation(tuple(options), [options, [dataset.fingerprint for dataset in datasets.values()]])


def _scores(config: TraceConfig, measured: Measured, *, of_base: bool = False) -> list[float]:
    """The score on each task; higher is better."""
    scores = []
    for name, task in config.tasks.items():
        if task.benchmark is None:
            assert measured.texts is not None
            model = measured.texts.base if of_base else measured.texts.model
            assert model is not None
            scores.append(-model.sets[name].bits_per_byte)
        else:
            assert measured.benchmarks is not None
            found = measured.benchmarks.base if of_base else measured.benchmarks.model
            result = found[task.benchmark.partition(":")[0]]
            metric = result.metrics[result.metric]
            scores.append(metric.value if metric.higher_is_better else -metric.value)
    return scores


def _learned(config: TraceConfig, chain: Chain) -> Learned:
    scores = [_scores(config, measured) for measured in chain.measurements]
    return Learned(
        method=chain.method,
        seed=chain.seed,
        scores=scores,
        overall=overall_performance(scores),
        transfer=backward_transfer(scores),
        training=chain.trainings,
    )


def _results(config: TraceConfig, made: Sequence[Chain], failed: Mapping[str, str]) -> TraceResults:
    learned = [_learned(config, chain) for chain in made]
    first = made[0].measurements[0]
    by_method = {name: [one for one in learned if one.method == name] for name in config.methods}
    any_measured = first.texts or first.benchmarks
    assert any_measured is not None
    return TraceResults(
        date=time.strftime("%Y-%m-%d"),
        settings=config.model_dump(mode="json"),
        versions=any_measured.versions,
        environment=learned[0].training[0].environment,
        score=TEXT_SCORE if first.texts else BENCHMARK_SCORE,
        tasks=list(config.tasks),
        base=_scores(config, first, of_base=True),
        rows={name: _row(found) for name, found in by_method.items() if found},
        learned=learned,
        failed=dict(failed),
    )


def _row(learned: Sequence[Learned]) -> MethodRow:
    count = range(len(learned[0].scores))
    return MethodRow(
        seeds=[one.seed for one in learned],
        overall=spread([one.overall[-1] for one in learned]),
        transfer=spread([one.transfer[-1] for one in learned]),
        scores=[[fmean(one.scores[t][i] for one in learned) for i in count] for t in count],
        parameters=learned[0].training[0].parameters,
        tokens=spread([sum(task.tokens for task in one.training) for one in learned]),
        seconds=spread([sum(task.seconds for task in one.training) for one in learned]),
    )
