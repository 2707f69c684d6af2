"""AdamW that clips, and that can be told not to step: masters, moments and step count then stay as they are.

DeepSpeed calls the optimizer once per flat partition when the gradient norm is already known, and offers no way to
skip from there. Skip and spike rules live in the function asked here. Clipping is done here too, because DeepSpeed
rounds its factor in another way at each ZeRO stage.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from llamapro.config.optimizer import OptimizerConfig

FACTOR_STEPS = 1 << 16
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) with a veto, and with its state there from the start.

    Attributes:
        gradient_factor: asked before each partition is updated: what to multiply its gradient by, or None to leave the
            partition alone.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], settings: OptimizerConfig, *, fused: bool) -> None:
        super().__init__(
            groups,
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=False,
            fused=fused,
        )
        self.gradient_factor: Callable[[], float | None] = lambda: 1.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed put into the groups, unless vetoed."""
        factor = self.gradient_factor()
        if factor is None:
            return
        if factor != 1.0:
            for gradient in (part.grad for group in self.param_groups for part in group["params"]):
                gradient.mul_(factor)
        super().step(closure)

    def make_state(self, partitions: Iterable[torch.Tensor]) -> None:
        """Give each flat partition the state that torch would make on its first update."""
        fused = bool(self.defaults["fused"])
        for partition in partitions:
            if not self.state[partition]:
                count = torch.zeros((), dtype=torch.float32, device=partition.device if fused else "cpu")
                moments = {key: torch.zeros_like(partition, requires_grad=False) for key in MOMENTS}
                self.state[partition] = {"step": count, **moments}

    @property
    def steps(self) -> int:
        """Updates applied so far; skipped ones don't count."""
        return max((int(state["step"].item()) for state in self.state.values()), default=0)

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self.state.values():
            state["step"].fill_(count)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use this learning rate from now on."""
        for group in self.param_groups:
            group["lr"] = learning_rate


def clip_factor(gradient_norm: float, limit: float | None) -> float:
    """What a gradient is multiplied by so that its norm is at most `limit`.

    Rounded to 16 bits: the norm's last bits, in which ZeRO stages differ, then don't reach the weights.
    """
    if limit is None or gradient_norm <= limit:
        return 1.0
    fraction, exponent = math.frexp(limit / gradient_norm)
    return math.ldexp(round(fraction * FACTOR_STEPS), exponent) / FACTOR_STEPS


def decay_groups(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices, which decay, and everything of one dimension, which does not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if len(full_shape(parameter)) >= 2 else vectors).append(parameter)
    groups = [(matrices, settings.weight_decay), (vectors, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, also where stage 3 holds only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
