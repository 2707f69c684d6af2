"""Memory per device in bytes, item by item: what ZeRO splits, what activations need, what passes through.

Only trainable parameters have gradients and optimizer state, in float32; blocks below the lowest trainable one keep no
activations, frozen ones above it no inputs of their linears. Estimators that count every parameter as trained are off
by a factor of three here.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from llamapro.planning.activations import (
    FLOAT32_BYTES,
    block_at_work_bytes,
    fp8_cast_bytes,
    kept_bytes,
    outside_bytes,
)
from llamapro.planning.buffers import Buffers
from llamapro.planning.flops import again_flops_of_block
from llamapro.planning.recompute import BlockCost, peak_parts
from llamapro.planning.shape import DecoderShape, Learning

DeviceKind = Literal["cuda", "cpu"]

GIB: Final = 1 << 30
FP8_FROZEN: Final = "fp8-frozen"
# Of what is not in FP8.
WEIGHT_BYTES: Final = {"bf16": 2, "float32": 4, FP8_FROZEN: 2}
# Float32 master weight and two moments.
OPTIMIZER_BYTES: Final = 3 * FLOAT32_BYTES
# The loss is computed in chunks of so many logits, which exist as logits, softmax and gradient.
LOGIT_CHUNK_ELEMENTS: Final = {"cuda": 1 << 27, "cpu": 1 << 23}
_LOGIT_COPIES: Final = 3
# Stage 1 in bf16 sums the gradients of small models in a copy; DeepSpeed's own bound, in elements.
_SUMMED_AT_ONCE: Final = 500_000_000
# torch's AdamW on the CPU makes the update and its denominator; the fused one of GPUs makes nothing.
_ADAMW_COPIES: Final = {"cuda": 0, "cpu": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes per device by item.

    Attributes:
        weights: all parameters as computed with; at stage 3 this rank's share.
        gathered: at stage 3, the parameters that are held whole at once.
        gradients: float32, of trainable parameters.
        optimizer: float32 master weights and moments of trainable parameters.
        communication: DeepSpeed's buffers for gradients on their way.
        frozen, trainable: what frozen and trainable blocks keep for the backward pass of one micro-batch, at the
            moment when all of them together keep most.
        logits: what the loss works on: a chunk of logits, the final hidden states.
        block_at_work: what comes and goes in a block's backward pass, when the loss is done.
        update: what comes and goes in the optimizer step, when no activations are left.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    communication: float
    frozen: float
    trainable: float
    logits: float
    block_at_work: float
    update: float

    @property
    def static(self) -> float:
        """What does not depend on the micro-batch."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.communication

    @property
    def activations(self) -> float:
        """The most that blocks keep at any moment."""
        return self.frozen + self.trainable

    @property
    def at_work(self) -> float:
        """What comes and goes on top of the activations: in the loss or in a block, whichever is more."""
        return max(self.logits, self.block_at_work)

    @property
    def total(self) -> float:
        """The most at any moment."""
        return self.static + max(self.activations + self.at_work, self.update)


def estimate_memory(
    shape: DecoderShape,
    learning: Learning,
    *,
    precision: str,
    zero_stage: int,
    world_size: int,
    micro_tokens: int,
    sequence_length: int,
    recomputed: Collection[int] = (),
    fused: bool = False,
    device: DeviceKind = "cuda",
    buffers: Buffers | None = None,
) -> Memory:
    """Memory of one device in training.

    Args:
        precision: as `engine.precision`.
        zero_stage: 1 splits the optimizer state over ranks, 2 gradients too, 3 weights too.
        micro_tokens: tokens per device in one forward and backward pass.
        sequence_length: tokens that attention runs over.
        recomputed: blocks that are computed again in the backward pass.
        fused: blocks are compiled.
        buffers: None: those of the stage's own settings.
    """
    width = WEIGHT_BYTES[precision]
    buffers = buffers or Buffers.of(zero_stage)
    costs = block_costs(shape, learning, width, micro_tokens, sequence_length, fused=fused)
    frozen, trainable_bytes = peak_parts(costs, recomputed)
    trainable = learning.parameters(shape)
    split_weights = zero_stage >= 3 and world_size > 1
    casts = fp8_cast_bytes(shape, fused=fused) if precision == FP8_FROZEN else 0.0
    return Memory(
        weights=_weights(shape, learning, precision) / (world_size if split_weights else 1),
        gathered=min(shape.parameters, buffers.gathered) * width if split_weights else 0.0,
        gradients=trainable * FLOAT32_BYTES / (world_size if zero_stage >= 2 else 1),
        optimizer=trainable * OPTIMIZER_BYTES / world_size,
        communication=_communication(zero_stage, world_size, width, buffers.reduced, trainable, device),
        frozen=frozen,
        trainable=trainable_bytes,
        logits=_logits(shape, width, micro_tokens, device),
        block_at_work=micro_tokens * (block_at_work_bytes(shape, width) + casts) if costs else 0.0,
        update=_update(zero_stage, world_size, width, trainable, device),
    )


def block_costs(
    shape: DecoderShape,
    learning: Learning,
    width: int,
    micro_tokens: int,
    sequence_length: int,
    *,
    fused: bool = False,
) -> tuple[BlockCost, ...]:
    """What each block of the backward pass keeps, and what computing it again costs; from the lowest upward.

    Args:
        width: bytes per activation, 2 for bf16.
        sequence_length: tokens that attention runs over.
        fused: blocks are compiled.
    """
    lowest = learning.lowest()
    blocks = () if lowest is None else range(lowest, shape.blocks)
    return tuple(
        BlockCost(
            block=block,
            kept=micro_tokens * kept_bytes(shape, block, learning.includes(block), width, sequence_length, fused=fused),
            entry=float(micro_tokens * shape.hidden * width),
            flops=again_flops_of_block(shape, block, sequence_length),
            trainable=learning.includes(block),
        )
        for block in blocks
    )


def _weights(shape: DecoderShape, learning: Learning, precision: str) -> float:
    saved = sum(size.fp8_saving for size in learning.frozen(shape)) if precision == FP8_FROZEN else 0
    return float(shape.parameters * WEIGHT_BYTES[precision] - saved)


def _communication(
    zero_stage: int, world_size: int, width: int, bucket: int, trainable: int, device: DeviceKind
) -> float:
    """The bucket that gradients are laid into, and with several ranks its float32 copies on their way.

    Stage 1 in bf16 has none while activations exist (see `_update`). On a GPU the bucket takes its memory whatever
    learns, on the CPU only what is written.
    """
    if zero_stage == 1 and width < FLOAT32_BYTES:
        return 0.0
    written = min(bucket, trainable)
    copied = world_size > 1 and (zero_stage == 3 or width < FLOAT32_BYTES)
    held = bucket if device == "cuda" else written
    return float(held * (FLOAT32_BYTES if zero_stage == 3 else width) + (written * FLOAT32_BYTES if copied else 0))


def _logits(shape: DecoderShape, width: int, micro_tokens: int, device: DeviceKind) -> float:
    rows = max(1, LOGIT_CHUNK_ELEMENTS[device] // shape.vocabulary)
    chunk = min(micro_tokens, rows) * shape.vocabulary * FLOAT32_BYTES * _LOGIT_COPIES
    return chunk + micro_tokens * outside_bytes(shape, width)


def _update(zero_stage: int, world_size: int, width: int, trainable: int, device: DeviceKind) -> float:
    """Copies of this rank's gradients in the optimizer step; at stage 1 in bf16 those of the sum over ranks before."""
    share = trainable * FLOAT32_BYTES / world_size
    summed = 0.0
    if zero_stage == 1 and width < FLOAT32_BYTES and trainable <= _SUMMED_AT_ONCE:
        summed = float(trainable * FLOAT32_BYTES)
    flattened = share if zero_stage == 3 else 0.0
    return max(summed, math.fsum([flattened, share * _ADAMW_COPIES[device]]))
