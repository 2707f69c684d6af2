"""Open a run: its parts in the order in which they depend on each other, then the restored progress."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import nn

from llamapro import console
from llamapro.checkpoint.folder import Checkpoint
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.config.root import RunConfig
from llamapro.engine.engine import Engine
from llamapro.evaluation.model_digest import model_digest
from llamapro.expansion.record import ExpansionRecord
from llamapro.files.lock import RunLock
from llamapro.modeling.build import build_model
from llamapro.modeling.compiled import choose_compile, compile_model
from llamapro.modeling.fp8 import describe_fp8, quantize_linears
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.planning.memory import FP8_FROZEN
from llamapro.planning.tables import gib, recomputation
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.agreement import agree
from llamapro.training.fp8 import folds_at_start
from llamapro.training.guards import SpikeGuard
from llamapro.training.live_record import record_in_memory, record_of_plain
from llamapro.training.metrics import MetricsLog, cut_back
from llamapro.training.preflight import Facts
from llamapro.training.progress import Progress
from llamapro.training.resume import AdapterIdentity, ResumeDecision, RunIdentity, architecture_digest, decide_resume
from llamapro.training.session import Session
from llamapro.training.signals import StopRequest
from llamapro.training.sources import configured_blend, open_stream, open_validation_sets, resolved_steps
from llamapro.training.start_from import load_start, open_start
from llamapro.training.trackers import open_trackers
from llamapro.training.trainer_state import TrainerState, saved_state

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, FP8_FROZEN: torch.bfloat16}


def open_session(
    config: RunConfig,
    facts: Facts,
    folder: RunFolder,
    ranks: Ranks,
    stop: StopRequest,
    lock: RunLock | None,
    checkpoint: Checkpoint | None,
) -> tuple[Session, Progress]:
    """Make the parts of a run and restore its checkpoint; collective.

    Args:
        lock: of the run folder, on rank 0.
        checkpoint: the newest valid one of this run; None at its first start.

    Returns:
        The session, and the progress to continue from.

    Raises:
        ConfigError: the configuration would make the checkpoint's run another one.
        CheckFailed: a base tensor differs from its record.
    """
    saved = saved_state(checkpoint)
    progress = saved.progress if saved else Progress()
    identity = run_identity(config, facts, folder)
    decision = _decide(saved, identity, config)
    stream = open_stream(config, facts, folder, saved, new_stage=decision.new_stage)
    started = start_engine(config, facts, ranks, facts.accumulation_steps)
    engine = started.engine
    guard = _guard(config)
    _restore(checkpoint, config, facts, engine, ranks)
    if saved is not None:
        guard.restore(saved.guard)
    session = Session(
        config=config,
        facts=facts,
        folder=folder,
        ranks=ranks,
        engine=engine,
        stream=stream,
        steps=identity.steps,
        source_names=tuple(facts.sources),
        guard=guard,
        metrics=_metrics(config, folder, ranks, progress.step if saved else -1),
        stop=stop,
        deadline=_deadline(config),
        lock=lock,
        identity=identity,
        live_record=_live_record(facts, engine.model, ranks),
        fp8_start=started.fp8_start,
        validation_sets=open_validation_sets(config, facts, ranks),
    )
    _say_start(session, progress, checkpoint, decision, engine.model)
    return session, progress


class Started(NamedTuple):
    """An engine with its model.

    Attributes:
        fp8_start: folds of what is in FP8; empty where nothing is.
    """

    engine: Engine
    fp8_start: Mapping[str, int]


def start_engine(config: RunConfig, facts: Facts, ranks: Ranks, accumulation_steps: int) -> Started:
    """Build the model from its folder and put it under an engine, as a run trains it; collective.

    Raises:
        CheckFailed: a base tensor differs from its record.
    """
    model = agree(ranks, lambda: _build(config, facts, ranks))
    fp8_start = folds_at_start(model, ranks)
    recompute_blocks(model.blocks, facts.recomputed)
    agree(ranks, lambda: _compile(model, config, ranks))
    engine = Engine.start(
        model,
        model.trainable_parameters(),
        config,
        ranks,
        zero_stage=facts.zero_stage,
        micro_sequences=facts.micro_sequences,
        accumulation_steps=accumulation_steps,
    )
    return Started(engine, fp8_start)


def run_identity(config: RunConfig, facts: Facts, folder: RunFolder) -> RunIdentity:
    """What makes this run this run, for the checkpoint and for the next resume."""
    trainable = facts.trainable
    return RunIdentity(
        model=facts.record.digest() if facts.record else model_digest(facts.model_folder),
        architecture=architecture_digest(facts.model_config),
        trainable="all" if trainable.everything else ",".join(map(str, sorted(trainable.blocks))),
        adapters=AdapterIdentity(**asdict(trainable.adapters)) if trainable.adapters else None,
        seed=config.run.seed,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        sources={name: dataset.fingerprint for name, dataset in facts.sources.items()},
        **configured_blend(config),
        steps=resolved_steps(config, facts, folder),
        schedule=config.schedule.model_dump(mode="json", exclude={"steps"}),
        optimizer=config.optimizer.model_dump(mode="json"),
        objective=config.objective.model_dump(mode="json"),
    )


def _decide(saved: TrainerState | None, identity: RunIdentity, config: RunConfig) -> ResumeDecision:
    if saved is None:
        return ResumeDecision((), new_stage=False)
    return decide_resume(saved.identity, identity, saved.progress.step, config.checkpoint.accept)


def _build(config: RunConfig, facts: Facts, ranks: Ranks) -> LanguageModel:
    return build_model(
        facts.model_folder,
        dtype=DTYPES[config.engine.precision],
        device=ranks.device,
        trainable=facts.trainable,
        record=facts.record,
        attention=config.engine.attention,
        when_filled=_when_filled(config, facts),
        digest_share=(ranks.rank, ranks.world_size),
        seed=config.run.seed,
    )


def _compile(model: LanguageModel, config: RunConfig, ranks: Ranks) -> None:
    compile_model(model, choose_compile(config.engine.compile, model, ranks.device))


def _when_filled(config: RunConfig, facts: Facts) -> Callable[[nn.Module], None] | None:
    """What is done to each module as soon as its weights are read and checked."""
    if config.engine.precision == FP8_FROZEN:
        assert facts.zero_stage != 3, "what is in FP8 is whole on every rank"
        return quantize_linears
    return Engine.partitioner(config, facts.zero_stage)


def _restore(checkpoint: Checkpoint | None, config: RunConfig, facts: Facts, engine: Engine, ranks: Ranks) -> None:
    """The run's own checkpoint wins; `start_from` gives weights to a run that has none yet."""
    start_from = config.checkpoint.start_from
    if checkpoint is not None:
        load_checkpoint(checkpoint, engine, ranks)
    elif start_from is not None:
        start = agree(ranks, lambda: open_start(start_from, facts.record))
        load_start(start, engine, ranks)
        console.info(f"weights from {start.folder}, with a fresh optimizer")


def _guard(config: RunConfig) -> SpikeGuard:
    settings = config.guards
    return SpikeGuard(
        spikes=settings.spike != "off",
        sigma=settings.spike_sigma,
        window_steps=settings.spike_window_steps,
        max_skipped_in_a_row=settings.max_skipped_in_a_row,
    )


def _live_record(facts: Facts, model: LanguageModel, ranks: Ranks) -> ExpansionRecord | None:
    record, held = facts.record, model.stored_dtypes()
    if record is None and facts.trainable.everything:
        return None
    if record is None:
        shape = facts.job.shape
        record = record_of_plain(facts.model_folder, facts.model_config, facts.family, shape.blocks, held, ranks)
    return record_in_memory(record, facts.model_folder, held, ranks)


def _deadline(config: RunConfig) -> float | None:
    minutes = config.run.stop_after_minutes
    return None if minutes is None else time.monotonic() + 60 * minutes


def _metrics(config: RunConfig, folder: RunFolder, ranks: Ranks, last_step: int) -> MetricsLog:
    """`last_step`: the last one whose numbers stand; -1 at a first start, also when an earlier one saved nothing."""
    if ranks.rank != 0:
        return MetricsLog(None)
    cut_back(folder.metrics_file, last_step)
    trackers = open_trackers(config.logging.trackers, folder.tensorboard, last_step + 1)
    return MetricsLog(folder.metrics_file, trackers)


def _say_start(
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
    decision: ResumeDecision,
    model: LanguageModel,
) -> None:
    facts = session.facts
    console.info(f"attention: {model.attention.name} ({model.attention.reason}); compiled: {model.compiled}")
    if session.fp8_start:
        console.info(f"precision: {describe_fp8(model.blocks, model.trainable, session.ranks.device)}")
    console.info(
        f"activations: {gib(facts.memory.activations)} GiB planned; recomputed: "
        f"{recomputation(facts.job, facts.recomputed)}"
    )
    console.info(
        f"ZeRO stage {facts.zero_stage}, {session.ranks.world_size} ranks, micro-batch {facts.micro_sequences} × "
        f"{facts.accumulation_steps}, {session.steps:,} steps"
    )
    if checkpoint is None:
        session.metrics.event("start", step=0)
        return
    session.metrics.event("resume", step=progress.step, checkpoint=checkpoint.folder.name, changes=decision.events)
    console.info(f"continuing after step {progress.step} from {checkpoint.folder}")
    for change in decision.events:
        console.info(f"changed on resume: {change}")
