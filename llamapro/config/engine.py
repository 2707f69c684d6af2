"""Section `engine`: how the work is spread over devices. Nothing here changes what is learned beyond rounding."""

from typing import Annotated, Literal

from pydantic import Field

from llamapro.config.base import FilePath, Positive, Section


class EngineConfig(Section):
    """How the work is spread over devices. Nothing here changes what is learned beyond rounding."""

    zero_stage: Annotated[int, Field(ge=1, le=3)] | Literal["auto"] = "auto"
    """What DeepSpeed ZeRO splits over ranks: 1 optimizer state, 2 gradients too, 3 weights too; auto: the fastest that
    fits, which is the lowest."""

    precision: Literal["bf16", "float32", "fp8-frozen"] = "bf16"
    """Dtype of weights and activations: bf16 (with float32 master weights and gradients), float32, or fp8-frozen (bf16
    with the linear layers of frozen blocks in FP8; ZeRO 1 and 2, GPUs from Hopper on, docs/fp8.md)."""

    offload: Literal["none", "optimizer"] = "none"
    """What is kept in host memory: none, or the optimizer state."""

    activation_memory_gib: Positive | Literal["auto", "unlimited"] = "auto"
    """Memory per GPU for activations, in GiB; beyond it whole blocks are recomputed. auto: unlimited where it fits."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each kind of block and of the loss; auto: on GPUs."""

    attention: Literal["auto", "flash", "cudnn", "sdpa", "math"] = "auto"
    """Attention kernel: flash (over all documents at once; FA4, FA3 or torch's own FA2), cudnn, sdpa, math; auto: the
    fastest one present that computes what the model needs."""

    startup_timeout_minutes: Positive = 30.0
    """Minutes that ranks wait for each other until the first step."""

    step_timeout_minutes: Positive = 10.0
    """Minutes without a finished micro-step after which the run is considered hung and ends."""

    deepspeed: FilePath | None = None
    """JSON file laid over the DeepSpeed configuration of the chosen stage (ds_configs/zeroN.json)."""
