"""What the quickstart measured, gathered from the files that the commands wrote."""

import platform
from dataclasses import dataclass
from pathlib import Path

import orjson

from llamapro.errors import Corrupted
from llamapro.evaluation.results import Change, SetResult, read_results
from llamapro.expansion.record import read_record
from llamapro.run_folder import RunFolder

from .plan import DOMAIN, GENERAL, Machine, Places, read_samples

TITLES = {DOMAIN: "phenotypes (new domain)", GENERAL: "Wikipedia (general)"}


@dataclass(frozen=True)
class Score:
    """One held-out text before and after; `change` is that of the loss as a fraction, negative is better."""

    title: str
    before: SetResult
    after: SetResult
    change: Change


@dataclass(frozen=True)
class Outcome:
    """The whole result.

    Attributes:
        losses: (step, nats per token) of every training step.
        base_tensors: tensors of the base that `llamapro verify` found bit-identical in the export.
        samples: continuations, one dict with `model`, `prompt` and `continuation` each.
        machine: what it ran on, in words.
        training_minutes: wall time of the training steps.
    """

    scores: tuple[Score, ...]
    losses: tuple[tuple[int, float], ...]
    base_blocks: int
    blocks: int
    base_tensors: int
    tokens: int
    training_minutes: float
    samples: tuple[dict[str, str], ...]
    machine: str


def gather(places: Places, machine: Machine) -> Outcome:
    """Read everything.

    Raises:
        Corrupted: a file that an earlier step wrote is gone.
    """
    record = read_record(places.export)
    results = read_results(places.evaluation)
    if record is None or results is None or results.base is None:
        raise Corrupted(f"{places.outcome} is incomplete; delete it and run the same command again")
    metrics = read_metrics(RunFolder(places.run).metrics_file)
    before, after = results.base.sets, results.model.sets
    scores = tuple(Score(title, before[name], after[name], results.changes[name]) for name, title in TITLES.items())
    steps = [line for line in metrics if "loss" in line]
    return Outcome(
        scores=scores,
        losses=tuple((int(line["step"]), float(line["loss"])) for line in steps),
        base_blocks=record.base_blocks,
        blocks=record.blocks,
        base_tensors=len(record.base_tensors),
        tokens=int(steps[-1]["tokens"]),
        training_minutes=sum(float(line["step_seconds"]) for line in steps) / 60,
        samples=tuple(read_samples(places.samples)),
        machine=describe(machine),
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The metric lines of a run; events are left out."""
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return [line for line in lines if "event" not in line]


def describe(machine: Machine) -> str:
    """The machine in words: processes, devices, processor."""
    kind = "GPU" if machine.has_gpu else "CPU"
    return f"{machine.ranks} {kind} process{'es' if machine.ranks > 1 else ''}, {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
