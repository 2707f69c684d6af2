"""The result files of experiments: what each training took and came to, and means over seeds."""

from collections.abc import Sequence
from math import prod
from statistics import fmean, stdev
from typing import Any

import orjson

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.errors import CheckFailed
from llamapro.evaluation.results import Change
from llamapro.evaluation.stored import Stored
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.metrics import read_metrics

FORMAT_VERSION = 1


class Training(Stored):
    """What one training took.

    Attributes:
        parameters: how many learned.
        tokens: target tokens, without padding.
        seconds: wall time of its steps; start, saves and evaluations apart.
        environment: versions and hardware.
    """

    parameters: int
    tokens: int
    seconds: float
    environment: dict[str, Any]


class Spread(Stored):
    """The mean over seeds and the standard deviation of a seed's value around it (None: there is one seed)."""

    mean: float
    deviation: float | None


class Trial(Stored):
    """One variant with one seed.

    Attributes:
        domain, general: mean over the domain (general) texts of the change of loss, as a fraction of the base's;
            negative is better. For one text the change of loss is the change of bits per byte.
        texts: the change on each text, with its 95 % half width over rows.
        benchmarks: model's value minus the base's.
        training: what each training took, in order.
    """

    variant: str
    seed: int
    domain: float
    general: float
    texts: dict[str, Change]
    benchmarks: dict[str, float]
    training: list[Training]


class Row(Stored):
    """A variant over its seeds; a failed seed is left out."""

    seeds: list[int]
    domain: Spread
    general: Spread
    benchmarks: dict[str, Spread]
    parameters: int
    tokens: Spread
    seconds: Spread


class AblationResults(Stored):
    """The whole of ablation.json.

    Attributes:
        settings: the configuration.
        versions: of the programs that measured.
        environment: versions and hardware of the first training.
        failed: "variant, seed N" and why.
    """

    format_version: int = FORMAT_VERSION
    date: str
    settings: dict[str, Any]
    versions: dict[str, str]
    environment: dict[str, Any]
    rows: dict[str, Row]
    trials: list[Trial]
    failed: dict[str, str]


class Learned(Stored):
    """One method with one seed through a sequence of tasks.

    Attributes:
        scores: row t, column i: the score on task i after learning task t; higher is better.
        overall: OP_t after each task t.
        transfer: BWT_t after each task t.
        training: what each task's training took.
    """

    method: str
    seed: int
    scores: list[list[float]]
    overall: list[float]
    transfer: list[float]
    training: list[Training]


class MethodRow(Stored):
    """A method over its seeds: OP and BWT after the last task, and the mean matrix."""

    seeds: list[int]
    overall: Spread
    transfer: Spread
    scores: list[list[float]]
    parameters: int
    tokens: Spread
    seconds: Spread


class TraceResults(Stored):
    """The whole of trace.json.

    Attributes:
        score: what a score is, in words.
        tasks: names in the order of learning.
        base: the untrained base's score on each task.
        failed: "method, seed N" and why.
    """

    format_version: int = FORMAT_VERSION
    date: str
    settings: dict[str, Any]
    versions: dict[str, str]
    environment: dict[str, Any]
    score: str
    tasks: list[str]
    base: list[float]
    rows: dict[str, MethodRow]
    learned: list[Learned]
    failed: dict[str, str]


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n − 1) of the values of several seeds."""
    return Spread(mean=fmean(values), deviation=stdev(values) if len(values) > 1 else None)


def read_training(run: RunFolder) -> Training:
    """What a finished run took, from its newest checkpoint and its metrics.

    Raises:
        CheckFailed: it has no checkpoint or no step.
    """
    checkpoint = find_checkpoint(run.checkpoints, Ranks.solo())
    steps = [line for line in read_metrics(run.metrics_file) if "step_seconds" in line]
    if checkpoint is None or not steps:
        raise CheckFailed(f"{run.path} ended without a checkpoint or a step")
    return Training(
        parameters=sum(prod(parameter.shape) for parameter in checkpoint.index.parameters.values()),
        tokens=int(steps[-1]["tokens"]),
        seconds=sum(line["step_seconds"] for line in steps),
        environment=orjson.loads(run.environment_file.read_bytes()),
    )
