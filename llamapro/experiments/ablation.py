"""Variants of one training at equal tokens: each trained once per seed, measured on the same texts, put in one table.

For a seed every variant sees the same rows in the same order: the order depends on the seed and the datasets alone.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from llamapro.data.dataset import Dataset
from llamapro.evaluation.model_digest import model_digest
from llamapro.evaluation.results import Results
from llamapro.experiments.chain import Chain, Evaluation, Measured, Phase, Place, make_chains
from llamapro.experiments.config import AblationConfig, EvaluationConfig, VariantConfig
from llamapro.experiments.evaluation_options import benchmark_options
from llamapro.experiments.load import open_inputs
from llamapro.experiments.pages import write_ablation
from llamapro.experiments.results import AblationResults, Row, Trial, spread
from llamapro.files.lock import RunLock


def run_ablation(config: AblationConfig) -> AblationResults:
    """Train, measure and write ablation.json, ablation.md and ablation.svg.

    Raises:
        ConfigError: the base or a dataset can't be used.
        CheckFailed: every variant failed; if only some did, the results name them.
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
            write=lambda results: write_ablation(config.folder, results),
        )


def plan_chains(config: AblationConfig, place: Place, datasets: Mapping[str, Dataset]) -> list[Chain]:
    """A chain for each seed and variant: all variants with the first seed come first, so that they can be compared."""
    evaluation = _evaluation(config, datasets)
    phases = {name: _phases(config, variant, datasets, evaluation) for name, variant in config.variants.items()}
    return [
        Chain(place, name, variant, seed, phases[name])
        for seed in config.seeds
        for name, variant in config.variants.items()
    ]


def _open(config: AblationConfig) -> dict[str, Dataset]:
    paths = {f"data.sources.{name}": source.path for name, source in config.data.sources.items()}
    if config.sft is not None:
        paths |= {f"sft.data.sources.{name}": source.path for name, source in config.sft.data.sources.items()}
    measured = {f"evaluation.domain.{name}": path for name, path in config.evaluation.domain.items()}
    measured |= {f"evaluation.general.{name}": path for name, path in config.evaluation.general.items()}
    return open_inputs(config.base, paths | measured, measured)


def _phases(
    config: AblationConfig, variant: VariantConfig, datasets: Mapping[str, Dataset], evaluation: Evaluation
) -> list[Phase]:
    phases = []
    if variant.base is None:
        phases.append(_pretraining(config, variant, datasets, evaluation if config.sft is None else None))
    if config.sft is not None:
        phases.append(_instruction_tuning(config, datasets, evaluation))
    return phases


def _pretraining(
    config: AblationConfig, variant: VariantConfig, datasets: Mapping[str, Dataset], evaluation: Evaluation | None
) -> Phase:
    rate = variant.learning_rate or config.schedule.learning_rate
    steps = config.budget_tokens // config.step_tokens
    sections = {
        **_dumped(config, "data", "batch", "optimizer", "engine"),
        "schedule": {**config.schedule.model_dump(), "steps": steps, "learning_rate": rate},
        "logging": {"every_steps": max(1, steps // 10)},
    }
    if variant.objective is not None:
        sections["objective"] = variant.objective.model_dump()
    return Phase("pretrain", "pretrain", sections, None, _fingerprints(datasets, "data."), evaluation)


def _instruction_tuning(config: AblationConfig, datasets: Mapping[str, Dataset], evaluation: Evaluation) -> Phase:
    assert config.sft is not None
    sections = _dumped(config.sft, "data", "batch", "schedule") | _dumped(config, "optimizer", "engine")
    return Phase("sft", "sft", sections, config.sft.trainable, _fingerprints(datasets, "sft."), evaluation)


def _dumped(config: Any, *sections: str) -> dict[str, Any]:
    return {name: getattr(config, name).model_dump() for name in sections}


def _fingerprints(datasets: Mapping[str, Dataset], below: str) -> dict[str, str]:
    return {key: dataset.fingerprint for key, dataset in datasets.items() if key.startswith(below)}


def _evaluation(config: AblationConfig, datasets: Mapping[str, Dataset]) -> Evaluation:
    chosen = config.evaluation
    length = chosen.sequence_length or config.data.sequence_length
    options = [word for name, path in chosen.texts.items() for word in ("--text", f"{name}={path}")]
    options += ["--sequences", str(chosen.sequences), "--sequence-length", str(length)]
    options += benchmark_options(chosen.tasks, chosen.limit, chosen.task_data)
    return Evaluation(tuple(options), [options, _fingerprints(datasets, "evaluation.")])


def _trial(evaluation: EvaluationConfig, chain: Chain) -> Trial:
    measured = chain.measurements[-1]
    changes, benchmarks = _texts(measured).changes, measured.benchmarks
    return Trial(
        variant=chain.method,
        seed=chain.seed,
        domain=fmean(changes[name].fraction for name in evaluation.domain),
        general=fmean(changes[name].fraction for name in evaluation.general),
        texts=changes,
        benchmarks={name: one.difference for name, one in benchmarks.changes.items()} if benchmarks else {},
        training=chain.trainings,
    )


def _texts(measured: Measured) -> Results:
    assert measured.texts is not None, "an ablation measures at least two texts"
    return measured.texts


def _results(config: AblationConfig, made: Sequence[Chain], failed: Mapping[str, str]) -> AblationResults:
    trials = [_trial(config.evaluation, chain) for chain in made]
    by_variant = {name: [trial for trial in trials if trial.variant == name] for name in config.variants}
    return AblationResults(
        date=time.strftime("%Y-%m-%d"),
        settings=config.model_dump(mode="json"),
        versions=_texts(made[-1].measurements[-1]).versions,
        environment=trials[0].training[0].environment,
        rows={name: _row(found) for name, found in by_variant.items() if found},
        trials=trials,
        failed=dict(failed),
    )


def _row(trials: Sequence[Trial]) -> Row:
    return Row(
        seeds=[trial.seed for trial in trials],
        domain=spread([trial.domain for trial in trials]),
        general=spread([trial.general for trial in trials]),
        benchmarks={name: spread([trial.benchmarks[name] for trial in trials]) for name in trials[0].benchmarks},
        parameters=trials[0].training[0].parameters,
        tokens=spread([sum(one.tokens for one in trial.training) for trial in trials]),
        seconds=spread([sum(one.seconds for one in trial.training) for trial in trials]),
    )
