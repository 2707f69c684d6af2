"""Section `objective`: what is minimized besides the loss of the next token."""

from typing import Annotated

from pydantic import Field, Strict

from llamapro.config.base import Name, Section


class ObjectiveConfig(Section):
    """What is minimized besides the loss of the next token."""

    replay_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the base's own predictions (new blocks bypassed), in nats per token."""

    sets: Annotated[tuple[Name, ...], Strict(False)] = ()
    """Sources on which replay_kl is applied."""
