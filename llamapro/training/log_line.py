"""What a person sees of a step: one line, with rates measured over the step and the time left.

Throughput counts target tokens, not padding. MFU divides the FLOPs that these tokens need (frozen weights have no
weight gradients) by the device's peak; HFU divides all that is computed: every position, and what is computed again.
Both count attention over whole sequences. They are "n/a" where no peak is known.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from llamapro.data.loader import SampleStream
from llamapro.planning.flops import FlopsPerToken
from llamapro.ranks import Ranks
from llamapro.training.progress import Progress, StepOutcome

GIB = 1 << 30


class StepTimer:
    """Wall time of steps; validation, saves and the first step (compilation, first gathers) don't count for the ETA."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._durations: list[float] = []

    def restart(self) -> None:
        """Begin timing the next step here: what happened since the last step is not part of it."""
        self._start = time.monotonic()

    def stop(self) -> float:
        """End the step; returns its seconds."""
        seconds = time.monotonic() - self._start
        self._durations.append(seconds)
        self._start = time.monotonic()
        return seconds

    def left(self, steps: int) -> float:
        """Seconds that `steps` more steps will take, from the mean of those measured."""
        counted = self._durations[1:] or self._durations
        return steps * sum(counted) / max(1, len(counted))


@dataclass(frozen=True)
class StepMeasures:
    """Resources of one step on this rank.

    Attributes:
        flops: per token.
        positions: that this rank computed, with padding.
        peak_flops: per device and second, or None where unknown.
    """

    seconds: float
    wait_seconds: float
    flops: FlopsPerToken
    positions: int
    peak_flops: float | None

    def values(self, outcome: StepOutcome, progress: Progress, ranks: Ranks) -> dict[str, float]:
        """The numbers of a step for metrics.jsonl, by their names there."""
        rate = outcome.tokens / self.seconds / ranks.world_size
        values = {
            "loss": outcome.loss,
            "learning_rate": outcome.learning_rate,
            "gradient_norm": outcome.gradient_norm,
            "tokens_per_second_per_gpu": rate,
            "memory_gib": used_memory_gib(ranks.device),
            "data_wait_fraction": self.wait_seconds / self.seconds,
            "step_seconds": self.seconds,
            "tokens": float(progress.tokens),
            "sequences": float(progress.sequences),
        }
        if self.peak_flops:
            values["mfu"] = rate * self.flops.model / self.peak_flops
            values["hfu"] = self.positions / self.seconds * self.flops.hardware / self.peak_flops
        if outcome.replay_kl is not None:
            values["replay_kl"] = outcome.replay_kl
        return values | {f"loss/{name}": loss for name, loss in outcome.source_losses.items()}


def source_values(stream: SampleStream, progress: Progress) -> dict[str, float]:
    """For each source, the target tokens of the run so far, and how often its rows were gone through."""
    taken = stream.taken(progress.sequences)
    tokens = {f"tokens/{name}": float(count) for name, count in progress.source_tokens.items()}
    return tokens | {f"epoch/{use.name}": taken[use.name] / use.plan.rows for use in stream.sources}


def used_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def step_line(step: int, steps: int, values: Mapping[str, float], seconds_left: float, device: torch.device) -> str:
    """The log line of one step."""
    unit = "GPU" if device.type == "cuda" else "process"
    mfu = f"{values['mfu']:.1%}" if "mfu" in values else "n/a"
    parts = [
        f"step {step:>{len(str(steps))}}/{steps} {step / steps:>4.0%}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad norm {values['gradient_norm']:.3f}",
        f"{values['tokens_per_second_per_gpu']:,.0f} tokens/s/{unit}",
        f"MFU {mfu}",
        *([f"HFU {values['hfu']:.1%}"] if "hfu" in values else []),
        f"{values['memory_gib']:.2f} GiB",
        f"data wait {values['data_wait_fraction']:.1%}",
        f"ETA {duration(seconds_left)}",
    ]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 07 min, 5 d 03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
