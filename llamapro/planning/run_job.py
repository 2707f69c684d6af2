"""The job that a run configuration describes."""

import math

from llamapro.config.root import RunConfig
from llamapro.config.strategies import read_overlay
from llamapro.planning.memory import WEIGHT_BYTES, DeviceKind
from llamapro.planning.plan import Job
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.planning.tables import gib


def job_of_run(
    config: RunConfig, shape: DecoderShape, learning: Learning, world_size: int, device: DeviceKind = "cuda"
) -> Job:
    """What is to be planned.

    Raises:
        ConfigError: the file `engine.deepspeed` can't be read.
    """
    engine = config.engine
    return Job(
        shape=shape.with_adapters(learning),
        learning=learning,
        precision=engine.precision,
        sequence_length=config.data.sequence_length,
        world_size=world_size,
        share=math.ceil(config.batch.global_sequences / world_size),
        activation_memory_gib=engine.activation_memory_gib,
        compiled=compiles(engine.compile, shape, device),
        device=device,
        overlay=read_overlay(engine.deepspeed) if engine.deepspeed else {},
    )


def beyond_plan(config: RunConfig, job: Job, micro_sequences: int) -> str:
    """What a run needs that no number of its plan holds, in words; empty where that is nothing."""
    if config.objective.replay_kl == 0:
        return ""
    forward = job.flops().forward / 1e9
    # Of the base, of the model for the same rows, and the gradient of the latter.
    states = 3 * micro_sequences * job.sequence_length * job.shape.hidden * WEIGHT_BYTES[job.precision]
    return (
        f"objective.replay_kl is not in these numbers: the base's forward pass takes {forward:.3g} GFLOP per token of "
        f"{', '.join(config.objective.sets)}, and at most {gib(states)} GiB per rank"
    )


def compiles(setting: str, shape: DecoderShape, device: DeviceKind) -> bool:
    """Whether blocks will be compiled: `auto` does it on GPUs, for blocks that make one graph."""
    one_graph = not shape.scores_kept and not any(size.experts for size in shape.block_sizes)
    return setting == "on" or (setting == "auto" and device == "cuda" and one_graph)
