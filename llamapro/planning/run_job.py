"""The job that a run configuration describes."""

import math

from llamapro.config.root import RunConfig
from llamapro.config.strategies import read_overlay
from llamapro.planning.memory import DeviceKind
from llamapro.planning.plan import Job
from llamapro.planning.shape import DecoderShape, Learning


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


def compiles(setting: str, shape: DecoderShape, device: DeviceKind) -> bool:
    """Whether blocks will be compiled: `auto` does it on GPUs, for blocks that make one graph."""
    one_graph = not shape.scores_kept and not any(size.experts for size in shape.block_sizes)
    return setting == "on" or (setting == "auto" and device == "cuda" and one_graph)
