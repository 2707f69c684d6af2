"""What a run did, read from its folder: configuration, measured steps, validations, events, evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro.config.yaml_file import read_yaml
from llamapro.data.manifest import read_dataset_manifest
from llamapro.errors import LlamaproError
from llamapro.evaluation.results import Results, read_results
from llamapro.run_folder import RunFolder
from llamapro.training.metrics import read_metrics

EVALUATION_FOLDER = "evaluation"
_VALIDATION = "validation/"


@dataclass(frozen=True)
class SetScore:
    """A validation set's score: nats per token, bits per UTF-8 byte."""

    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class BeforeAfter:
    """A text set's bits per byte and loss before the first step and after the last one that was scored."""

    name: str
    before: SetScore
    after: SetScore

    @property
    def change(self) -> float:
        """By which fraction the bits per byte went up; negative is better."""
        return self.after.bits_per_byte / self.before.bits_per_byte - 1


@dataclass(frozen=True)
class SourceFacts:
    """A source of training text as the configuration names it; `license` is empty where the dataset states none."""

    name: str
    share: str
    license: str


@dataclass(frozen=True)
class History:
    """A run, up to some step.

    Attributes:
        config: config.yaml as plain values.
        steps: the measured values of each optimizer step, by their names in metrics.jsonl.
        validations: per scored step, the score of each set.
        evaluation: what `llamapro evaluate` wrote into RUN/evaluation, if it did.
    """

    folder: Path
    config: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    validations: tuple[tuple[int, Mapping[str, SetScore]], ...]
    events: tuple[Mapping[str, Any], ...]
    evaluation: Results | None

    @property
    def last_step(self) -> int:
        """The last measured optimizer step; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def tokens(self) -> int:
        """Target tokens trained on."""
        return int(self.steps[-1].get("tokens", 0)) if self.steps else 0

    @property
    def step_seconds(self) -> float:
        """Seconds spent in optimizer steps, without validation and saves."""
        return float(sum(line.get("step_seconds", 0.0) for line in self.steps))

    def setting(self, *keys: str) -> Any:
        """One value of the configuration by its path; None where the file has none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def before_after(self) -> tuple[BeforeAfter, ...]:
        """Each validation set before training and at the last validation; empty when either is missing."""
        if len(self.validations) < 2 or self.validations[0][0] != 0:
            return ()
        before, after = self.validations[0][1], self.validations[-1][1]
        return tuple(BeforeAfter(name, before[name], after[name]) for name in before if name in after)


def read_history(run: Path, up_to_step: int | None = None) -> History:
    """Read a run folder; missing files are empty history.

    Args:
        up_to_step: leave out what was measured after this optimizer step.
    """
    folder = RunFolder(run)
    lines = read_metrics(folder.metrics_file)
    measured = [line for line in lines if "event" not in line and _within(line, up_to_step)]
    return History(
        folder=run,
        config=read_yaml(folder.config_file).values if folder.config_file.exists() else {},
        steps=tuple(line for line in measured if "loss" in line),
        validations=_validations(measured),
        events=tuple(line for line in lines if "event" in line and _within(line, up_to_step)),
        evaluation=read_results(run / EVALUATION_FOLDER),
    )


def source_facts(history: History) -> tuple[SourceFacts, ...]:
    """The training sources with their shares and, where the datasets are still there, their licences."""
    sources = history.setting("data", "sources") or {}
    return tuple(SourceFacts(name, _share(source, sources), _license(source)) for name, source in sources.items())


def _within(line: Mapping[str, Any], step: int | None) -> bool:
    return step is None or int(line.get("step", 0)) <= step


def _validations(lines: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, Mapping[str, SetScore]], ...]:
    scored: dict[int, dict[str, SetScore]] = {}
    for line in lines:
        names = {key.split("/")[1] for key in line if key.startswith(_VALIDATION)}
        for name in sorted(names):
            loss, bits = (line.get(f"{_VALIDATION}{name}/{key}") for key in ("loss", "bits_per_byte"))
            if loss is not None and bits is not None:
                scored.setdefault(int(line["step"]), {})[name] = SetScore(loss, bits)
    return tuple(sorted(scored.items()))


def _share(source: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> str:
    if source.get("repeat") is not None:
        return f"{source['repeat']:g} passes"
    total = sum(other.get("weight") or 0.0 for other in sources.values())
    return f"{(source.get('weight') or 0.0) / total:.0%} of the tokens" if total else "all tokens"


def _license(source: Mapping[str, Any]) -> str:
    try:
        return read_dataset_manifest(Path(source["path"])).license
    except (LlamaproError, KeyError, OSError):
        return ""
