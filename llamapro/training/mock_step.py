"""One optimizer step of a run at its full shape, on random tokens: what `--dry-run` does after the plan.

The model is built and put under the engine as the run itself does it, so what doesn't fit or can't run shows here. No
data is read, nothing is written, no lock is taken.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from llamapro import console
from llamapro.config.root import RunConfig
from llamapro.data.batches import Batch
from llamapro.engine.engine import Engine
from llamapro.engine.start import start_ranks, stop_ranks
from llamapro.errors import EXIT_USAGE, LlamaproError
from llamapro.planning.plan import ZERO_STAGES
from llamapro.planning.tables import gib
from llamapro.ranks import Ranks
from llamapro.training.opening import start_engine
from llamapro.training.preflight import Facts
from llamapro.training.randomness import seed_step
from llamapro.training.replay import ReplayObjective, replay_objective
from llamapro.training.step import to_device

# While the second one runs, the first one's gradients are there too.
MICRO_BATCHES = 2
# How torch's allocators say that memory ran out where they have no error class of their own.
_CPU_REFUSALS = ("can't allocate memory", "not enough memory")


class OutOfMemory(LlamaproError):
    """The run doesn't fit on its devices as it is configured. Met by one rank, which ends the job."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class MockStep:
    """What the step took; the most of any rank.

    Attributes:
        seconds: of the whole step, with whatever is done once: compiling, first gathers.
        last_seconds: of the last micro-batch.
        peak_bytes: memory for the model and the step: allocated on a GPU; on the CPU, what the process grew by.
    """

    seconds: float
    last_seconds: float
    peak_bytes: float


def try_step(config: RunConfig, facts: Facts, local_rank: int | None) -> None:
    """Start the ranks, take the step and show what it took beside the plan; collective.

    Raises:
        OutOfMemory: says what to change.
    """
    with ExitStack() as stack:
        ranks = start_ranks(config.engine, local_rank)
        stack.callback(stop_ranks)
        try:
            with _memory_running_out(config, facts, ranks):
                step = mock_step(config, facts, ranks)
        except OutOfMemory:
            stack.pop_all()  # leaving the group would wait for ranks that are in the middle of the step
            raise
        _show(facts, step, ranks)


def mock_step(config: RunConfig, facts: Facts, ranks: Ranks) -> MockStep:
    """Build model and engine, and take one step."""
    before = _begin_measuring(ranks.device)
    micro_batches = min(MICRO_BATCHES, facts.accumulation_steps)
    engine = start_engine(config, facts, ranks, micro_batches).engine
    console.info(
        f"one step of {micro_batches} × {facts.micro_sequences} × {facts.sequence_length} random tokens per rank"
    )
    objective = replay_objective(config, facts)
    seed_step(config.run.seed, 0, ranks.rank)
    started = time.perf_counter()
    for _ in range(micro_batches):
        last = time.perf_counter()
        _micro_step(engine, objective.everywhere(random_batch(facts)), objective, ranks, micro_batches)
    ended = time.perf_counter()
    engine.step(config.schedule.learning_rate)
    _wait_for(ranks.device)
    peak = _peak_bytes(ranks.device) - before
    measured = [ended - last, time.perf_counter() - started, peak]
    engine.close()
    most = [max(column) for column in zip(*ranks.all_gather_json(measured), strict=True)]
    return MockStep(seconds=most[1], last_seconds=most[0], peak_bytes=most[2])


def random_batch(facts: Facts) -> Batch:
    """A micro-batch of random tokens, each row one document, every position but the last with a target."""
    rows, length = facts.micro_sequences, facts.sequence_length
    ids = torch.randint(facts.job.shape.vocabulary, (rows, length + 1)).numpy()
    return Batch(
        input_ids=ids[:, :-1].copy(),
        labels=ids[:, 1:].copy(),
        position_ids=np.broadcast_to(np.arange(length), (rows, length)).copy(),
        sources=np.zeros(rows, dtype=np.int64),
        valid_tokens=rows * length,
    )


def _micro_step(engine: Engine, batch: Batch, objective: ReplayObjective, ranks: Ranks, micro_batches: int) -> None:
    inputs, _ = to_device(batch, ranks.device)
    loss = engine.forward_loss(*inputs, objective.of(batch, ranks.device) if objective.targets(batch) else None)
    engine.backward(loss.loss_sum, micro_batches * ranks.world_size * batch.valid_tokens)
    _wait_for(ranks.device)


def _begin_measuring(device: torch.device) -> float:
    """Bytes to take off the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    return float(psutil.Process().memory_info().rss)


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _memory_running_out(config: RunConfig, facts: Facts, ranks: Ranks) -> Iterator[None]:
    """Turn the allocator's error into one message.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).splitlines()
        refused = any(refusal in str(error) for refusal in _CPU_REFUSALS)
        if not (refused or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        raise OutOfMemory(_message(facts, ranks, said[0] if said else "no memory left")) from error


def _message(facts: Facts, ranks: Ranks, said: str) -> str:
    changes = []
    if facts.micro_sequences > 1:
        changes.append(f"batch.micro_sequences: {facts.micro_sequences // 2}")
    if facts.zero_stage < ZERO_STAGES[-1] and facts.world_size > 1:
        changes.append(f"engine.zero_stage: {facts.zero_stage + 1}")
    changes.append(f"engine.activation_memory_gib: {gib(facts.memory.activations / 2)}")
    changes.append(f"data.sequence_length: {facts.sequence_length // 2}")
    return (
        f"memory ran out in a step of {facts.micro_sequences} × {facts.sequence_length} tokens at ZeRO stage "
        f"{facts.zero_stage}: {gib(facts.memory.total)} GiB were planned and {facts.device.name} has "
        f"{gib(facts.device.memory_bytes)} ({said}); change one of {'; '.join(changes)}; or use more ranks"
    )


def _show(facts: Facts, step: MockStep, ranks: Ranks) -> None:
    tokens = facts.micro_sequences * facts.sequence_length
    unit = "GPU" if ranks.device.type == "cuda" else "process"
    rows = [
        ("peak memory planned", f"{gib(facts.memory.total)} GiB"),
        ("peak memory measured", f"{gib(step.peak_bytes)} GiB{_note(ranks.device)}"),
        ("seconds of the step", f"{step.seconds:.2f} (with what is done once)"),
        ("tokens/s of the last micro-batch", f"{tokens / step.last_seconds:,.0f} per {unit}"),
    ]
    console.table(f"one step on {ranks.world_size} ranks, the most of any rank", ("what", "value"), rows)


def _note(device: torch.device) -> str:
    return "" if device.type == "cuda" else " (what the process grew by, its libraries' own memory included)"
