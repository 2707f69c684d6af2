"""Everything a run needs to know before a process group starts: facts, or every problem at once.

Every rank runs this by itself and comes to the same result; nothing is written, nothing communicates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamapro import console
from llamapro.config.availability import unavailable_settings
from llamapro.config.root import RunConfig
from llamapro.data.dataset import Dataset
from llamapro.errors import ConfigError
from llamapro.expansion.families import Family
from llamapro.expansion.record import ExpansionRecord
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.advice import ways_out
from llamapro.planning.flops import FlopsPerToken
from llamapro.planning.memory import Memory
from llamapro.planning.plan import Choice, Job, choose, usable_bytes
from llamapro.planning.run_job import beyond_plan, job_of_run
from llamapro.planning.tables import (
    FLOPS_COLUMNS,
    LEARNING_COLUMNS,
    MEMORY_COLUMNS,
    flops_rows,
    gib,
    learning_rows,
    memory_rows,
    recomputation,
)
from llamapro.training.base_within import check_replay, check_retention
from llamapro.training.data_facts import ModelText, check_sources, check_validation_sets, warn_of_repeats
from llamapro.training.device import Device, present_device
from llamapro.training.findings import Findings
from llamapro.training.fp8 import check_fp8
from llamapro.training.kernels import check_kernels
from llamapro.training.model_facts import ModelFacts, Stage, check_model, learning_of, resolve_trainable
from llamapro.training.tokenizer import model_tokenizer_identity


@dataclass(frozen=True)
class Facts:
    """What the trainer starts from.

    Attributes:
        record: how the model was expanded; None if it never was.
        family: its parameter names; `family.decoder_prefix` is where the blocks are.
        sources: datasets by source name, in the configuration's order.
        validation_sets: datasets whose held-out splits are scored, by name.
        steps: optimizer steps of the run; None: until the repeats are used up, which the pack plans decide.
        zero_stage, micro_sequences, accumulation_steps: as given, or chosen for what `auto` stands for.
        recomputed: blocks that are computed again in the backward pass.
        flops: FLOPs per token.
        memory: bytes per rank, as estimated.
        tokenizer_identity: of the model; every dataset has the same.
        warnings: sentences that the user should see, once.
    """

    stage: Stage
    world_size: int
    model_folder: Path
    model_config: dict[str, Any]
    family: Family
    record: ExpansionRecord | None
    trainable: TrainableSet
    sources: dict[str, Dataset]
    validation_sets: dict[str, Dataset]
    sequence_length: int
    steps: int | None
    zero_stage: int
    micro_sequences: int
    accumulation_steps: int
    recomputed: frozenset[int]
    job: Job
    flops: FlopsPerToken
    memory: Memory
    device: Device
    tokenizer_identity: str
    warnings: tuple[str, ...]

    @property
    def positions(self) -> int:
        """Tokens that a rank computes in an optimizer step, with padding."""
        return self.micro_sequences * self.accumulation_steps * self.sequence_length


def check_facts(config: RunConfig, stage: Stage, world_size: int, device: Device | None = None) -> Facts:
    """Open what the configuration names and check that the run can start.

    Args:
        world_size: ranks of the job.
        device: what each rank computes on; None: what is present.

    Raises:
        ConfigError: every problem at once.
    """
    findings = Findings(problems=unavailable_settings(config))
    _check_paths(config, findings)
    model = check_model(config, findings)
    trainable = _resolve(config, stage, model, findings)
    device = device or present_device(world_size)
    check_kernels(config.engine, torch.device(device.kind), findings)
    check_fp8(config, model, trainable, findings)
    text = _model_text(model, findings)
    sources = check_sources(config, text, findings)
    validation_sets = check_validation_sets(config, sources, text, findings)
    if model is not None and trainable is not None:
        check_replay(config, model, trainable, findings)
        check_retention(config, model, trainable, sources.keys() - validation_sets.keys(), findings)
    if findings.problems or model is None or trainable is None or text is None:
        raise ConfigError(findings.problems, f"{stage} on {config.model.path}")
    steps = None if config.schedule.steps == "auto" else config.schedule.steps
    warn_of_repeats(config, sources, steps, findings)
    learning = learning_of(trainable)
    job = job_of_run(config, model.shape, learning, world_size, device.kind)
    choice = _choose(config, job, device, findings)
    _warn_of_waste(config, job, choice, findings)
    _warn_of_ignored(config, findings)
    return Facts(
        stage=stage,
        world_size=world_size,
        model_folder=model.folder,
        model_config=model.config,
        family=model.family,
        record=model.record,
        trainable=trainable,
        sources=sources,
        validation_sets=validation_sets,
        sequence_length=config.data.sequence_length,
        steps=steps,
        zero_stage=choice.zero_stage,
        micro_sequences=choice.micro_sequences,
        accumulation_steps=choice.accumulation_steps,
        recomputed=choice.recomputed,
        job=job,
        flops=job.flops(choice.recomputed),
        memory=choice.memory,
        device=device,
        tokenizer_identity=text.tokenizer_identity,
        warnings=tuple(findings.warnings),
    )


def show_plan(config: RunConfig, facts: Facts) -> None:
    """Print what a run would do (standard output, rank 0 only): the end of `--dry-run`."""
    shape, learning = facts.job.shape, facts.job.learning
    tokens_per_step = config.batch.global_sequences * facts.sequence_length
    steps = "until the repeats are used up" if facts.steps is None else f"{facts.steps:,}"
    rows = [
        ("parameters", f"{shape.parameters:,}"),
        ("that learn", f"{learning.parameters(shape):,}"),
        ("optimizer steps", steps),
        ("tokens per step", f"{tokens_per_step:,}"),
        ("ranks", str(facts.world_size)),
        ("device of a rank", f"{facts.device.name}, {gib(facts.device.memory_bytes)} GiB"),
        ("ZeRO stage", str(facts.zero_stage)),
        ("micro-batch", f"{facts.micro_sequences} sequences, {facts.accumulation_steps} per step and rank"),
        ("GFLOP per token", f"{facts.flops.model / 1e9:.3f} (forward and backward, only what learns)"),
        ("recomputed", recomputation(facts.job, facts.recomputed)),
        ("host memory of a save", f"{gib(facts.memory.optimizer)} GiB per rank, for as long as the run lasts"),
        *((f"source {name}", f"{data.split('train').tokens:,} tokens") for name, data in facts.sources.items()),
        *((f"held out {name}", f"{d.split('heldout').tokens:,} tokens") for name, d in facts.validation_sets.items()),
    ]
    console.table(f"{facts.stage} of {facts.model_folder}", ("what", "value"), rows)
    console.table("what learns", LEARNING_COLUMNS, learning_rows(facts.job))
    budget = usable_bytes(facts.device.memory_bytes)
    memory = memory_rows(facts.job, facts.micro_sequences, facts.recomputed, budget)
    console.table("memory per rank, GiB", MEMORY_COLUMNS, memory)
    console.table("FLOPs per token", FLOPS_COLUMNS, flops_rows(facts.flops))
    if beyond := beyond_plan(config, facts.job, facts.micro_sequences):
        console.info(beyond)


def _check_paths(config: RunConfig, findings: Findings) -> None:
    if config.run.folder.exists() and not config.run.folder.is_dir():
        findings.problem("run.folder", f"{config.run.folder} is a file")
    if (overlay := config.engine.deepspeed) is not None and not overlay.is_file():
        findings.problem("engine.deepspeed", f"{overlay} does not exist")
    if (start := config.checkpoint.start_from) is not None and not start.is_dir():
        findings.problem("checkpoint.start_from", f"{start} is no folder; give a checkpoint's")


def _resolve(config: RunConfig, stage: Stage, model: ModelFacts | None, findings: Findings) -> TrainableSet | None:
    if model is None:
        return None
    return findings.attempt("model.trainable", lambda: resolve_trainable(config.model, stage, model))


def _model_text(model: ModelFacts | None, findings: Findings) -> ModelText | None:
    if model is None:
        return None
    identity = findings.attempt("model.path", lambda: model_tokenizer_identity(model.folder))
    return None if identity is None else ModelText(model.folder, identity, model.shape.vocabulary)


def _choose(config: RunConfig, job: Job, device: Device, findings: Findings) -> Choice:
    stage, micro = config.engine.zero_stage, config.batch.micro_sequences
    budget = usable_bytes(device.memory_bytes)
    choice = choose(
        job,
        budget_bytes=budget,
        zero_stage=None if stage == "auto" else stage,
        micro_sequences=None if micro == "auto" else micro,
        most_micro_tokens=device.most_micro_tokens,
    )
    if not choice.fits:
        findings.warn(
            "batch.micro_sequences",
            f"about {gib(choice.memory.total)} GiB per rank are needed for {choice.micro_sequences} sequences of "
            f"{job.sequence_length} tokens at ZeRO stage {choice.zero_stage}, and {gib(budget)} GiB can be used on "
            f"{device.name}; {_advice(job, budget)}",
        )
    return choice


def _advice(job: Job, budget: float) -> str:
    ways = ways_out(job, budget)
    return f"what would fit: {'; or '.join(ways)}" if ways else "use a smaller model"


def _warn_of_waste(config: RunConfig, job: Job, choice: Choice, findings: Findings) -> None:
    """Say which share of the computed sequences is padding, because ranks or micro-batches don't divide the batch."""
    wanted = config.batch.global_sequences
    computed = job.world_size * choice.micro_sequences * choice.accumulation_steps
    if computed > wanted:
        findings.warn(
            "batch.global_sequences",
            f"{wanted} sequences over {job.world_size} ranks in micro-batches of {choice.micro_sequences} take "
            f"{computed}; {1 - wanted / computed:.0%} of the computation is padding",
        )


def _warn_of_ignored(config: RunConfig, findings: Findings) -> None:
    schedule = config.schedule
    if schedule.decay != "wsd" and schedule.decay_fraction != type(schedule).model_fields["decay_fraction"].default:
        findings.warn("schedule.decay_fraction", f"has no effect under decay: {schedule.decay}")
    if config.objective.sets and config.objective.replay_kl == 0:
        findings.warn("objective.sets", "has no effect while objective.replay_kl is 0")
