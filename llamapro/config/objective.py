"""Section `objective`: what is minimized besides the loss of the next token."""

from typing import Annotated

from pydantic import Field, Strict

from llamapro.config.base import Name, Section


class ObjectiveConfig(Section):
    """What is minimized besides the loss of the next token."""

    replay_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(base ‖ model), the divergence from the base's own predictions (new blocks bypassed), at each target
    token of the sets, against that token's loss. One more forward pass over their rows."""

    sets: Annotated[tuple[Name, ...], Strict(False)] = ()
    """Sources on which replay_kl is applied."""
