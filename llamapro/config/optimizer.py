"""Section `optimizer`: AdamW, with weight decay on matrices only."""

from typing import Annotated

from pydantic import Field, Strict

from llamapro.config.base import Positive, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW, with weight decay on matrices only."""

    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""

    eps: Positive = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay on matrices, per step and unit of learning rate; norms and biases are never decayed."""

    gradient_clip_norm: Positive | None = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. null: no clipping."""
