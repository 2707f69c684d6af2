"""How long a run takes, from FLOPs and an assumed share of the device's peak, which is always stated with it."""

from typing import Final

# Between 0.35 (operation by operation, flash attention) and 0.51 (the same without recomputed blocks at full matrix
# rate) for LLaMA2-7B + 8 blocks; multi-node runs lose some of it.
ASSUMED_EFFICIENCY: Final = 0.40
_SECONDS_PER_HOUR = 3600


def tokens_per_second(model_flops_per_token: float, peak_flops: float, efficiency: float = ASSUMED_EFFICIENCY) -> float:
    """Tokens per second of one device.

    Args:
        model_flops_per_token: `FlopsPerToken.model`.
        peak_flops: of the device, FLOP/s.
        efficiency: model FLOPs utilization (MFU) that is assumed.
    """
    return efficiency * peak_flops / model_flops_per_token


def gpu_hours(tokens: float, tokens_per_second_per_gpu: float) -> float:
    """Device hours that so many tokens take."""
    return tokens / tokens_per_second_per_gpu / _SECONDS_PER_HOUR
