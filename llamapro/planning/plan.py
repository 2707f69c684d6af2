"""The choices that `auto` stands for: the lowest ZeRO stage that fits, then the largest micro-batch that does.

Blocks are computed again in the backward pass only when nothing fits without that, or beyond a stated number of bytes.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from llamapro.errors import UserError
from llamapro.planning.buffers import Buffers
from llamapro.planning.flops import FlopsPerToken, flops_per_token
from llamapro.planning.memory import FP8_FROZEN, GIB, WEIGHT_BYTES, DeviceKind, Memory, block_costs, estimate_memory
from llamapro.planning.recompute import (
    BlockCost,
    fewest_recomputed,
    least_peak_bytes,
    most_recomputed,
)
from llamapro.planning.shape import DecoderShape, Learning

ZERO_STAGES: Final = (1, 2, 3)
# What is in FP8 is whole on every rank.
FP8_STAGES: Final = (1, 2)
# Kept free for fragmentation, workspaces of libraries, NCCL and the device's own needs.
RESERVED_FRACTION: Final = 0.1
# On CPUs larger micro-batches gain nothing and cost memory.
CPU_MICRO_TOKENS: Final = 1024


@dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        precision: as `engine.precision`.
        share: sequences per rank and optimizer step, rounded up.
        activation_memory_gib: as `engine.activation_memory_gib`.
        compiled: blocks are compiled.
        device: what ranks compute on.
        overlay: the content of `engine.deepspeed`.
    """

    shape: DecoderShape
    learning: Learning
    precision: str
    sequence_length: int
    world_size: int
    share: int
    activation_memory_gib: float | Literal["auto", "unlimited"] = "auto"
    compiled: bool = False
    device: DeviceKind = "cuda"
    overlay: Mapping[str, Any] = field(default_factory=dict)

    def memory(self, zero_stage: int, micro_sequences: int, recomputed: Collection[int] = ()) -> Memory:
        """Memory per device under these choices."""
        return estimate_memory(
            self.shape,
            self.learning,
            precision=self.precision,
            zero_stage=zero_stage,
            world_size=self.world_size,
            micro_tokens=micro_sequences * self.sequence_length,
            sequence_length=self.sequence_length,
            recomputed=recomputed,
            fused=self.compiled,
            device=self.device,
            buffers=Buffers.of(zero_stage, self.overlay),
        )

    def flops(self, recomputed: Collection[int] = ()) -> FlopsPerToken:
        """FLOPs per token."""
        return flops_per_token(self.shape, self.learning, self.sequence_length, recomputed)

    def recomputed(self, zero_stage: int, micro_sequences: int, budget: float) -> frozenset[int] | None:
        """The fewest blocks to compute again so that everything fits; None when it doesn't fit in any case."""
        memory = self.memory(zero_stage, micro_sequences)
        if memory.static + memory.update > budget:
            return None
        room = min(self.activation_limit, budget - memory.static - memory.at_work)
        if self.activation_memory_gib == "unlimited":
            return frozenset() if memory.activations <= room else None
        return fewest_recomputed(self.costs(micro_sequences), room)

    def fits(self, zero_stage: int, micro_sequences: int, budget: float) -> bool:
        """Whether everything fits without computing anything again."""
        memory = self.memory(zero_stage, micro_sequences)
        return memory.total <= budget and memory.activations <= self.activation_limit

    def largest_micro_batch(self, zero_stage: int, budget: float) -> int:
        """The most sequences that fit without computing anything again; 0 when one doesn't."""
        return bisect_left(range(1, self.share + 1), True, key=lambda micro: not self.fits(zero_stage, micro, budget))

    @property
    def activation_limit(self) -> float:
        """Bytes that activations may take by themselves."""
        gib = self.activation_memory_gib
        return math.inf if isinstance(gib, str) else gib * GIB

    def costs(self, micro_sequences: int) -> tuple[BlockCost, ...]:
        """The blocks of the backward pass with this micro-batch."""
        return block_costs(
            self.shape,
            self.learning,
            WEIGHT_BYTES[self.precision],
            micro_sequences * self.sequence_length,
            self.sequence_length,
            fused=self.compiled,
        )

    def recompute_flops(self, recomputed: Collection[int]) -> float:
        """FLOPs per token that computing these blocks again takes."""
        return self.flops(recomputed).block_recompute


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        accumulation_steps: micro-batches per rank and optimizer step.
        recomputed: blocks that are computed again in the backward pass.
        memory: per device, as estimated.
        fits: whether that is within the budget.
    """

    zero_stage: int
    micro_sequences: int
    accumulation_steps: int
    recomputed: frozenset[int]
    memory: Memory
    fits: bool


def usable_bytes(memory_bytes: float) -> float:
    """What a plan may use of a device's memory."""
    return memory_bytes * (1 - RESERVED_FRACTION)


def choose(
    job: Job,
    *,
    budget_bytes: float | None,
    zero_stage: int | None = None,
    micro_sequences: int | None = None,
    most_micro_tokens: int | None = None,
) -> Choice:
    """Choose the ZeRO stage and the micro-batch.

    The lowest stage under which the smallest allowed micro-batch fits; then, of the micro-batches that fit, the one
    that pads the fewest sequences in a step, the larger of two that pad equally few. When nothing fits as it is, the
    stage under which the fewest FLOPs are spent again; when nothing fits at all, the highest stage, the smallest
    micro-batch and every block computed again.

    Args:
        budget_bytes: memory per device that may be used; None: unknown, then stage 1 and one sequence are chosen.
        zero_stage, micro_sequences: given, not to be chosen.
        most_micro_tokens: upper bound of the micro-batch in tokens (at least one sequence is always allowed).
    """
    budget = math.inf if budget_bytes is None else budget_bytes
    smallest = micro_sequences or 1
    stages = (zero_stage,) if zero_stage else FP8_STAGES if job.precision == FP8_FROZEN else ZERO_STAGES
    _refuse_too_little(job, smallest)
    stage = _stage(job, stages, smallest, budget)
    largest = job.share if most_micro_tokens is None else most_micro_tokens // job.sequence_length
    largest = 1 if budget_bytes is None else largest
    fitting = min(largest, job.largest_micro_batch(stage, budget))
    candidates = range(1, max(1, fitting) + 1)
    micro = micro_sequences or min(candidates, key=lambda size: (_padded_rows(job.share, size), -size))
    recomputed = job.recomputed(stage, micro, budget)
    if recomputed is None:
        recomputed = _best_effort(job, micro)
    memory = job.memory(stage, micro, recomputed)
    return Choice(stage, micro, math.ceil(job.share / micro), recomputed, memory, memory.total <= budget)


def _stage(job: Job, stages: Collection[int], micro: int, budget: float) -> int:
    """The stage that spends the fewest FLOPs again, the lowest of several; the highest when none fits."""
    costs = {
        stage: job.recompute_flops(recomputed)
        for stage in stages
        if (recomputed := job.recomputed(stage, micro, budget)) is not None
    }
    return min(costs, key=lambda stage: costs[stage], default=max(stages))


def _best_effort(job: Job, micro: int) -> frozenset[int]:
    """What to compute again when memory is too small in any case."""
    return frozenset() if job.activation_memory_gib == "unlimited" else most_recomputed(job.costs(micro))


def _refuse_too_little(job: Job, micro: int) -> None:
    """Refuse a number of bytes that activations can't be brought under.

    Raises:
        UserError: says how many are needed.
    """
    costs = job.costs(micro)
    least = least_peak_bytes(costs)
    if least > job.activation_limit:
        largest = max(costs, key=lambda cost: cost.kept)
        raise UserError(
            f"engine.activation_memory_gib: {job.activation_memory_gib:g} GiB can't hold the activations of "
            f"{micro} × {job.sequence_length} tokens: with every block recomputed they take {least / GIB:.3g} GiB, of "
            f"which block {largest.block} at work {largest.kept / GIB:.3g}; give at least {least / GIB:.3g}, or lower "
            "batch.micro_sequences or data.sequence_length"
        )


def _padded_rows(share: int, micro: int) -> int:
    return math.ceil(share / micro) * micro - share
