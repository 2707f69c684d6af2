"""What may change when a run is resumed, what starts a new stage of the data, and what is refused.

The engine, micro batch, world size, logging, checkpoint and validation settings are free and not even recorded here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict

from llamapro.config.schedule import ScheduleConfig
from llamapro.errors import ConfigError
from llamapro.training.schedule import decay_start

SAYS_NOTHING_OF_THE_FUNCTION = {"llamapro", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
NEW_RUN = "start a new run folder with checkpoint.start_from pointing at this run's checkpoint instead"


class AdapterIdentity(BaseModel):
    """What an export needs to know of adapters beside their tensors; as `llamapro.modeling.trainable.Adapters`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    alpha: float
    transposed: bool


class RunIdentity(BaseModel):
    """What makes a run this run; stored in every checkpoint.

    Attributes:
        model: digest of the model's weights that the run does not train, or of all of them where it trains them all.
        architecture: `architecture_digest` of its config.json; empty in checkpoints that don't say.
        trainable: names of what trains: "all", or the block indices.
        adapters: they alone train, on these blocks; None: the blocks do.
        sources: dataset fingerprint by source name.
        shares: weight, or repeat, by source name; `share_kind` says which.
        steps: optimizer steps of the whole run.
        objective: empty in checkpoints that don't say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    architecture: str = ""
    trainable: str
    adapters: AdapterIdentity | None = None
    seed: int
    sequence_length: int
    packing: str
    sources: dict[str, str]
    share_kind: Literal["weight", "repeat"]
    shares: dict[str, float]
    planned_stages: tuple[dict[str, Any], ...]
    global_sequences: int
    steps: int
    schedule: dict[str, Any]
    optimizer: dict[str, Any]
    objective: dict[str, Any] = {}


@dataclass(frozen=True)
class ResumeDecision:
    """What a resume with a changed configuration means.

    Attributes:
        events: one sentence per allowed change, for the log.
        new_stage: whether the data blend starts a new stage at the resume step.
    """

    events: tuple[str, ...]
    new_stage: bool


def architecture_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what config.json says of the function that the model computes."""
    stated = {key: value for key, value in config.items() if key not in SAYS_NOTHING_OF_THE_FUNCTION}
    return sha256(orjson.dumps(stated, option=orjson.OPT_SORT_KEYS)).hexdigest()


def decide_resume(stored: RunIdentity, now: RunIdentity, step: int, accept: Sequence[str]) -> ResumeDecision:
    """Apply the resume rules to what differs between a checkpoint and the configuration.

    Args:
        step: the optimizer step the run continues from.
        accept: sections ("schedule", "optimizer") whose change the user accepts.

    Raises:
        ConfigError: a change that would make the run something else; every one of them, with the way out.
    """
    problems = [*_fixed(stored, now), *_data_problems(stored, now), *_steps(stored, now, step, accept)]
    events: list[str] = []
    for section in ("schedule", "optimizer"):
        changed = _changed_keys(getattr(stored, section), getattr(now, section))
        if changed and section in accept:
            events.append(f"{section} changed, as accepted: {changed}")
        elif changed:
            problems.append(
                f"{section}: {changed} since the checkpoint at step {step}; change it back, or add {section!r} to "
                f"checkpoint.accept, or {NEW_RUN}"
            )
    if problems:
        raise ConfigError(problems, "this run can't be resumed with the changed configuration")
    if stored.objective and stored.objective != now.objective:
        events.append(f"objective: {_changed_keys(stored.objective, now.objective)}")
    blend = blend_events(stored, now)
    if stored.steps != now.steps:
        events.append(f"schedule.steps {stored.steps} -> {now.steps}")
    return ResumeDecision(tuple(events + blend), new_stage=bool(blend))


def _fixed(stored: RunIdentity, now: RunIdentity) -> list[str]:
    names = {
        "model": "model.path: the model's weights",
        "trainable": "model.trainable",
        "adapters": "model.lora",
        "seed": "run.seed",
        "sequence_length": "data.sequence_length",
        "packing": "data.packing",
        "share_kind": "data.sources: the kind of share (weight or repeat)",
    }
    changed = [field for field in names if getattr(stored, field) != getattr(now, field)]
    if stored.architecture and stored.architecture != now.architecture:
        names["architecture"] = "model.path: the model's config.json"
        changed.append("architecture")
    return [
        f"{names[field]} changed from {getattr(stored, field)} to {getattr(now, field)}; change it back, or {NEW_RUN}"
        for field in changed
    ]


def _data_problems(stored: RunIdentity, now: RunIdentity) -> list[str]:
    problems = []
    for name, fingerprint in stored.sources.items():
        if name not in now.sources:
            problems.append(f"data.sources.{name} is gone; keep it, or {NEW_RUN}")
        elif now.sources[name] != fingerprint:
            problems.append(f"data.sources.{name}: its shards changed; restore them, or {NEW_RUN}")
    if stored.share_kind == "repeat" == now.share_kind and stored.shares != now.shares:
        problems.append(f"data.sources: {_changed_keys(stored.shares, now.shares)}; change it back, or {NEW_RUN}")
    return problems


def _steps(stored: RunIdentity, now: RunIdentity, step: int, accept: Sequence[str]) -> list[str]:
    if stored.steps == now.steps or "schedule" in accept:
        return []
    schedule = ScheduleConfig.model_validate({**stored.schedule, "steps": stored.steps})
    if schedule.decay == "constant" or (schedule.decay == "wsd" and step <= decay_start(stored.steps, schedule)):
        return []
    return [
        f"schedule.steps changed from {stored.steps} to {now.steps} under {schedule.decay} decay, which bends the "
        f"learning rate already used; change it back, add 'schedule' to checkpoint.accept, use decay constant or wsd "
        f"for open-ended runs, or {NEW_RUN}"
    ]


def blend_events(stored: RunIdentity, now: RunIdentity) -> list[str]:
    """What makes the data blend begin a new stage, one sentence per change; none when it goes on as it was."""
    events = []
    if stored.shares != now.shares:
        events.append(f"data.sources: {_changed_keys(stored.shares, now.shares)}")
    if stored.planned_stages != now.planned_stages:
        events.append("data.stages changed")
    if stored.global_sequences != now.global_sequences:
        events.append(f"batch.global_sequences {stored.global_sequences} -> {now.global_sequences}")
    return events


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys)
