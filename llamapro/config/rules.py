"""The rules between fields. Each says which keys it reads, so that it stays silent when one of them is wrong itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llamapro.config.root import RunConfig

BROKEN_RULES: Final = "broken_rules"


@dataclass(frozen=True)
class BrokenRule:
    """One rule that a configuration breaks.

    Attributes:
        key: dotted key that the sentence begins with.
        text: the rest of it: the offending value, why, and what to do.
        reads: dotted keys whose values led to it; "a.b.*" reads everything below a.b as well.
    """

    key: str
    text: str
    reads: tuple[str, ...]


def broken_rules(config: RunConfig) -> tuple[BrokenRule, ...]:
    """Every rule between fields that this configuration breaks."""
    return tuple(broken for rule in _RULES for broken in rule(config))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence part about a name that does not exist: the nearest that does, and all of them."""
    names = sorted(known)
    nearest = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    listed = f" ({kind}s: {', '.join(names)})" if names else f" (there are no {kind}s)"
    return f"{name!r} is no {kind}{hint}{listed}"


def validation_set_names(config: RunConfig) -> tuple[str, ...]:
    """Names of the validation sets that this configuration asks for."""
    sets = config.validation.sets
    return tuple(sets) if isinstance(sets, Mapping) else tuple(config.data.sources)


def _one_kind_of_share(config: RunConfig) -> Iterator[BrokenRule]:
    sources = config.data.sources
    for name, source in sources.items():
        if source.weight is not None and source.repeat is not None:
            text = f"has both weight {source.weight:g} and repeat {source.repeat:g}; give one of them"
            yield BrokenRule(f"data.sources.{name}", text, (f"data.sources.{name}.*",))
        if source.weight is None and source.repeat is None:
            text = "has neither weight nor repeat; give one of them, e.g. weight: 1.0"
            yield BrokenRule(f"data.sources.{name}", text, (f"data.sources.{name}.*",))
    weighted = [name for name, source in sources.items() if source.weight is not None and source.repeat is None]
    repeated = [name for name, source in sources.items() if source.repeat is not None and source.weight is None]
    if weighted and repeated:
        text = f"weight ({', '.join(weighted)}) and repeat ({', '.join(repeated)}) are mixed; use one kind for all"
        yield BrokenRule("data.sources", text, ("data.sources.*",))


def _stages_fit(config: RunConfig) -> Iterator[BrokenRule]:
    known, last = config.data.sources, 0
    for index, stage in enumerate(config.data.stages):
        key = f"data.stages.{index}"
        for name in stage.weights:
            if name not in known:
                yield BrokenRule(f"{key}.weights", unknown_name("source", name, known), (f"{key}.*", "data.sources"))
        if stage.from_step <= last:
            text = f"{stage.from_step} does not come after {last}, where the stage before begins; list stages in order"
            yield BrokenRule(f"{key}.from_step", text, ("data.stages.*",))
        last = stage.from_step
    if config.data.stages and any(source.repeat is not None for source in known.values()):
        text = (
            "stages change weights, but the sources have a repeat; give the sources a weight, or leave out the stages"
        )
        yield BrokenRule("data.stages", text, ("data.stages.*", "data.sources.*"))


def _stages_begin_in_time(config: RunConfig) -> Iterator[BrokenRule]:
    steps = config.schedule.steps
    for index, stage in enumerate(config.data.stages):
        key = f"data.stages.{index}"
        if steps != "auto" and stage.from_step >= steps:
            text = f"{stage.from_step} is never reached: the run has {steps} steps, counted from 0 (schedule.steps)"
            yield BrokenRule(f"{key}.from_step", text, (f"{key}.*", "schedule.steps"))


def _auto_steps_need_repeat(config: RunConfig) -> Iterator[BrokenRule]:
    weighted = [name for name, source in config.data.sources.items() if source.repeat is None]
    if config.schedule.steps == "auto" and weighted:
        text = f"'auto' needs a repeat for every source, but {', '.join(weighted)} has none; give a number of steps"
        yield BrokenRule("schedule.steps", text, ("schedule.steps", "data.sources.*"))


def _phases_fit(config: RunConfig) -> Iterator[BrokenRule]:
    schedule = config.schedule
    if schedule.decay == "wsd" and schedule.warmup_fraction + schedule.decay_fraction > 1:
        text = (
            f"{schedule.decay_fraction:g} and warmup_fraction {schedule.warmup_fraction:g} are more than the whole run"
        )
        reads = ("schedule.decay", "schedule.decay_fraction", "schedule.warmup_fraction")
        yield BrokenRule("schedule.decay_fraction", text, reads)


def _retention_set_is_validated(config: RunConfig) -> Iterator[BrokenRule]:
    guard, names = config.guards.retention, validation_set_names(config)
    if guard is not None and guard.set not in names:
        text = unknown_name("validation set", guard.set, names)
        yield BrokenRule("guards.retention.set", text, ("guards.retention.*", "validation.sets", "data.sources"))


def _objective_sets_are_sources(config: RunConfig) -> Iterator[BrokenRule]:
    objective, sources = config.objective, config.data.sources
    for name in objective.sets:
        if name not in sources:
            yield BrokenRule("objective.sets", unknown_name("source", name, sources), ("objective.*", "data.sources"))
    if objective.replay_kl > 0 and not objective.sets:
        text = f"{objective.replay_kl:g} applies to no source; name them in objective.sets"
        yield BrokenRule("objective.replay_kl", text, ("objective.*",))


def _lora_is_described(config: RunConfig) -> Iterator[BrokenRule]:
    wanted = config.model.trainable == "lora"
    if wanted and config.model.lora is None:
        text = "'lora' needs model.lora, e.g. {rank: 16, alpha: 32, blocks: all}"
        yield BrokenRule("model.trainable", text, ("model.trainable", "model.lora.*"))
    if not wanted and config.model.lora is not None:
        text = f"is given, but model.trainable is {config.model.trainable!r}; set it to lora, or leave model.lora out"
        yield BrokenRule("model.lora", text, ("model.trainable", "model.lora.*"))


def _blocks_are_named_once(config: RunConfig) -> Iterator[BrokenRule]:
    blocks = config.model.trainable
    if isinstance(blocks, tuple) and len(set(blocks)) < len(blocks):
        twice = sorted({block for block in blocks if blocks.count(block) > 1})
        text = f"names block {', '.join(map(str, twice))} more than once"
        yield BrokenRule("model.trainable", text, ("model.trainable.*",))


def _fp8_weights_are_whole(config: RunConfig) -> Iterator[BrokenRule]:
    precision, stage = config.engine.precision, config.engine.zero_stage
    if precision == "fp8-frozen" and stage == 3:
        text = (
            "'fp8-frozen' keeps frozen weights whole on every rank, which zero_stage 3 is there to avoid; use "
            "zero_stage 1 or 2, where they take half of what they do in bf16, or precision bf16"
        )
        yield BrokenRule("engine.precision", text, ("engine.precision", "engine.zero_stage"))


def _adapters_are_not_on_fp8(config: RunConfig) -> Iterator[BrokenRule]:
    if config.engine.precision == "fp8-frozen" and config.model.trainable == "lora":
        text = "'fp8-frozen' would round the weights that adapters stand beside, and are merged into; use bf16"
        yield BrokenRule("engine.precision", text, ("engine.precision", "model.trainable"))


_RULES: Final[tuple[Callable[[RunConfig], Iterator[BrokenRule]], ...]] = (
    _one_kind_of_share,
    _stages_fit,
    _stages_begin_in_time,
    _auto_steps_need_repeat,
    _phases_fit,
    _retention_set_is_validated,
    _objective_sets_are_sources,
    _lora_is_described,
    _blocks_are_named_once,
    _fp8_weights_are_whole,
    _adapters_are_not_on_fp8,
)
