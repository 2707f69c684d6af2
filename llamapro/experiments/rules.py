"""The rules between the fields of an experiment's configuration. Each says which keys it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from llamapro.config.rules import BrokenRule, unknown_name
from llamapro.errors import UserError
from llamapro.expansion.layout import BY_IMPORTANCE, parse_placement

if TYPE_CHECKING:
    from llamapro.experiments.config import AblationConfig, LaunchConfig, VariantConfig
    from llamapro.experiments.trace_config import TraceConfig


def ablation_rules(config: AblationConfig) -> Iterator[BrokenRule]:
    """Every rule that an ablation breaks."""
    yield from _budget_fits(config.budget_tokens, config.step_tokens, "budget_tokens", "data.sequence_length")
    yield from _steps_follow(config.schedule.model_fields_set)
    yield from _common(config.seeds, config.launch)
    yield from _variants_fit("variants", config.variants)
    untouched = [name for name, variant in config.variants.items() if variant.base is not None]
    if untouched and config.sft is None:
        text = "nothing happens to the base: base: {} is the start of an instruction tuning; describe it in sft"
        yield BrokenRule(f"variants.{untouched[0]}.base", text, ("variants.*", "sft.*"))
    if config.sft is not None and config.sft.trainable == "new":
        without = [name for name, variant in config.variants.items() if variant.expand is None]
        if without:
            text = f"'new' needs new blocks, and {', '.join(without)} adds none; write all"
            yield BrokenRule("sft.trainable", text, ("sft.*", "variants.*"))
    for name, variant in config.variants.items():
        yield from _objective_fits(f"variants.{name}", variant, config.data.sources)
        yield from _strength_fits(f"variants.{name}.strength", variant, config)
    yield from _texts_fit(config)


def trace_rules(config: TraceConfig) -> Iterator[BrokenRule]:
    """Every rule that a sequence of tasks breaks."""
    yield from _budget_fits(config.tokens_per_task, config.step_tokens, "tokens_per_task", "sequence_length")
    yield from _steps_follow(config.schedule.model_fields_set)
    yield from _common(config.seeds, config.launch)
    yield from _variants_fit("methods", config.methods)
    for name, method in config.methods.items():
        if method.base is not None:
            text = "a method learns the tasks; the base's own scores are shown as row 0 of every matrix"
            yield BrokenRule(f"methods.{name}.base", text, ("methods.*",))
        if method.objective is not None:
            text = "a task has one source, and it is what is to be learned; leave it out"
            yield BrokenRule(f"methods.{name}.objective", text, ("methods.*",))
        if method.strength is not None:
            text = "would weaken the blocks again after each task; leave it out"
            yield BrokenRule(f"methods.{name}.strength", text, ("methods.*",))
    scored = {task.benchmark is not None for task in config.tasks.values()}
    if len(scored) > 1:
        text = "some have a benchmark and some none: a mean over accuracies and bits per byte says nothing"
        yield BrokenRule("tasks", text, ("tasks.*",))


def _budget_fits(tokens: int, step_tokens: int, key: str, length_key: str) -> Iterator[BrokenRule]:
    if tokens % step_tokens:
        nearest = max(1, round(tokens / step_tokens)) * step_tokens
        text = (
            f"{tokens:,} is no whole number of steps of {step_tokens:,} tokens (batch.global_sequences × "
            f"{length_key}); give {nearest}"
        )
        yield BrokenRule(key, text, (key, "batch.*", length_key))


def _steps_follow(given: set[str]) -> Iterator[BrokenRule]:
    if "steps" in given:
        yield BrokenRule("schedule.steps", "follows from the budget of tokens; leave it out", ("schedule.*",))


def _common(seeds: tuple[int, ...], launch: LaunchConfig) -> Iterator[BrokenRule]:
    if len(set(seeds)) < len(seeds):
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        yield BrokenRule("seeds", f"names {', '.join(map(str, twice))} more than once", ("seeds.*",))
    if launch.processes > 1 and launch.launcher == "python":
        text = f"'python' starts one process, not {launch.processes}; use launcher: deepspeed"
        yield BrokenRule("launch.launcher", text, ("launch.*",))


def _variants_fit(key: str, variants: Mapping[str, VariantConfig]) -> Iterator[BrokenRule]:
    for name, variant in variants.items():
        own = f"{key}.{name}"
        if len(variant.kinds) != 1:
            found = " and ".join(variant.kinds) or "none"
            text = f"has {found}; give exactly one of expand, lora, full and base"
            yield BrokenRule(own, text, (f"{own}.*",))
        yield from _expansion_fits(f"{own}.expand", variant)


def _expansion_fits(key: str, variant: VariantConfig) -> Iterator[BrokenRule]:
    expand = variant.expand
    if expand is None:
        return
    if expand.new_blocks % expand.copies_per_group:
        text = f"{expand.new_blocks} is no multiple of copies_per_group {expand.copies_per_group}"
        yield BrokenRule(f"{key}.new_blocks", text, (f"{key}.*",))
    try:
        placement = parse_placement(expand.placement)
    except UserError as error:
        yield BrokenRule(f"{key}.placement", str(error), (f"{key}.*",))
        return
    if (placement == BY_IMPORTANCE) != (expand.probe is not None):
        text = "importance is measured on text: give probe with placement importance, and only with it"
        yield BrokenRule(f"{key}.probe", text, (f"{key}.*",))


def _objective_fits(key: str, variant: VariantConfig, sources: Collection[str]) -> Iterator[BrokenRule]:
    if variant.objective is None:
        return
    if variant.expand is None:
        text = "is the divergence from a base within the model, and only expand has one there; leave it out"
        yield BrokenRule(f"{key}.objective", text, (f"{key}.*",))
    for name in variant.objective.sets:
        if name not in sources:
            text = unknown_name("source", name, sources)
            yield BrokenRule(f"{key}.objective.sets", text, (f"{key}.*", "data.*"))
    if variant.objective.replay_kl > 0 and not variant.objective.sets:
        text = "applies to no source; name them in sets"
        yield BrokenRule(f"{key}.objective.replay_kl", text, (f"{key}.*",))


def _strength_fits(key: str, variant: VariantConfig, config: AblationConfig) -> Iterator[BrokenRule]:
    if variant.strength is None:
        return
    if variant.expand is None:
        text = "is how much of the new blocks is kept, and only expand adds some; leave it out"
        yield BrokenRule(key, text, ("variants.*",))
    if config.sft is not None:
        text = "would weaken the blocks before the instruction tuning and after it; leave out one of the two"
        yield BrokenRule(key, text, ("variants.*", "sft.*"))


def _texts_fit(config: AblationConfig) -> Iterator[BrokenRule]:
    evaluation = config.evaluation
    if not (evaluation.domain and evaluation.general):
        text = "needs at least one domain text and one general text: what is learned, and what is kept"
        yield BrokenRule("evaluation", text, ("evaluation.*",))
    for name in sorted(set(evaluation.domain) & set(evaluation.general)):
        text = "is a domain text and a general text; give each its own name"
        yield BrokenRule(f"evaluation.general.{name}", text, ("evaluation.*",))
