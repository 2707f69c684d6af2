"""How long training takes: work by kind, each at a rate of its own that is stated with the result.

Linears run at a share of the device's peak, attention at a lower one, everything between them at the speed of the
device's memory; gradients and weights cross ranks at the speed of the links. Nothing is counted for launching kernels,
waiting for data or saving, and nothing overlaps but stage 3's gathering.
"""

from dataclasses import dataclass
from typing import Final

from llamapro.planning.activations import FLOAT32_BYTES, fused_frozen_block_bytes
from llamapro.planning.gpus import Gpu
from llamapro.planning.memory import WEIGHT_BYTES
from llamapro.planning.plan import Choice, Job

# 720 of an H200's 989 TFLOP/s: 790 measured for one large bf16 product, 680 to 750 expected in a long mixed run.
MATRIX_EFFICIENCY: Final = 0.73
# FlashAttention-2 on an H100, causal, heads of 128: about 370 and 300 of 989 TFLOP/s (FlashAttention-3: 667 and 444).
ATTENTION_FORWARD_EFFICIENCY: Final = 0.37
ATTENTION_BACKWARD_EFFICIENCY: Final = 0.30
# 4.0 of an H200's 4.8 TB/s, as streaming kernels reach.
MEMORY_EFFICIENCY: Final = 0.83
# Traffic of fused kernels between the linears of a 7-billion-parameter block, 162 KB forward and 282 KB backward, as
# multiples of the 93 KB that it keeps; run operation by operation the same work moves about three times as much.
GLUE_FORWARD: Final = 1.74
GLUE_BACKWARD: Final = 3.02
EAGER_GLUE: Final = 3.0
# FP8 products of frozen weights with the casts of their inputs, against bf16: 1.58 to 1.90 measured on an H200.
FP8_SPEEDUP: Final = 1.7
# Beyond this many GPUs a job crosses machines, with a 400 Gb/s adapter for each GPU.
GPUS_PER_MACHINE: Final = 8
NETWORK_BANDWIDTH: Final = 50e9
# Read and write of float32 master and two moments, read of the gradient, write of the low-precision weight.
_UPDATE_BYTES: Final = 6 * FLOAT32_BYTES + FLOAT32_BYTES
_SECONDS_PER_HOUR: Final = 3600


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one GPU per token.

    Attributes:
        linears, attention, glue: matrix products of linears; attention; norms, activations and the like.
        update: the optimizer step.
        communication: what isn't hidden behind the rest.
    """

    linears: float
    attention: float
    glue: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.linears + self.attention + self.glue + self.update + self.communication

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return 1 / self.total


def token_time(job: Job, choice: Choice, gpu: Gpu, efficiency: float = MATRIX_EFFICIENCY) -> TokenTime:
    """The time that a token takes.

    Args:
        gpu: what it runs on; its peak may have been measured.
        efficiency: share of the peak that linears reach.
    """
    linears, attention = _compute_seconds(job, choice, gpu, efficiency)
    glue = _glue_bytes(job, choice) / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    step_tokens = choice.micro_sequences * choice.accumulation_steps * job.sequence_length
    updated = job.learning.parameters(job.shape) / job.world_size * (_UPDATE_BYTES + WEIGHT_BYTES[job.precision])
    update = updated / (gpu.memory_bandwidth * MEMORY_EFFICIENCY) / step_tokens
    communication = _communicated_bytes(job, choice) / link_bandwidth(gpu, job.world_size) / step_tokens
    if choice.zero_stage == 3:  # gathered and reduced beside the computation
        communication = max(0.0, communication - linears - attention - glue)
    return TokenTime(linears, attention, glue, update, communication)


def gpu_hours(tokens: float, tokens_per_second_per_gpu: float) -> float:
    """Device hours that so many tokens take."""
    return tokens / tokens_per_second_per_gpu / _SECONDS_PER_HOUR


def link_bandwidth(gpu: Gpu, count: int) -> float:
    """Bytes per second that one of so many GPUs sends."""
    return gpu.link_bandwidth if count <= GPUS_PER_MACHINE else min(gpu.link_bandwidth, NETWORK_BANDWIDTH)


def _compute_seconds(job: Job, choice: Choice, gpu: Gpu, efficiency: float) -> tuple[float, float]:
    """Linears, blocks computed again with them; attention with the scores that its backward pass computes again."""
    flops = job.flops(choice.recomputed)
    linear = flops.linear + flops.block_recompute
    if job.precision == "fp8-frozen":
        linear -= flops.frozen_linear * (1 - 1 / FP8_SPEEDUP)
    forward = flops.forward_attention / (gpu.bf16_flops * ATTENTION_FORWARD_EFFICIENCY)
    backward = flops.attention_backward + flops.attention_recompute
    return linear / (gpu.bf16_flops * efficiency), forward + backward / (gpu.bf16_flops * ATTENTION_BACKWARD_EFFICIENCY)


def _glue_bytes(job: Job, choice: Choice) -> float:
    """Per token."""
    shape = job.shape
    block = fused_frozen_block_bytes(shape, WEIGHT_BYTES[job.precision]) * (1.0 if job.compiled else EAGER_GLUE)
    forward = (shape.blocks + len(choice.recomputed)) * GLUE_FORWARD
    return block * (forward + job.learning.backward_blocks(shape) * GLUE_BACKWARD)


def _communicated_bytes(job: Job, choice: Choice) -> float:
    """What one rank sends in an optimizer step; a sum over ranks passes everything twice, once to each half."""
    width, ranks = WEIGHT_BYTES[job.precision], job.world_size
    trainable = job.learning.parameters(job.shape)
    weights, gradients = trainable * width, trainable * FLOAT32_BYTES
    others = (ranks - 1) / ranks
    if choice.zero_stage == 1:
        return others * (2 * gradients + weights)
    if choice.zero_stage == 2:
        return others * (2 * gradients * choice.accumulation_steps + weights)
    backward = sum(size.parameters for size in job.learning.backward(job.shape))
    again = backward + job.shape.head_parameters
    return others * choice.accumulation_steps * ((job.shape.parameters + again) * width + gradients)
