"""What a checkpoint remembers for the loop, besides weights and optimizer state: checked when it is read."""

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from llamapro.checkpoint.folder import Checkpoint
from llamapro.data.loader import StageUse
from llamapro.errors import Corrupted
from llamapro.training.progress import Progress
from llamapro.training.resume import RunIdentity


class TrainerState(BaseModel):
    """The loop's state.

    Attributes:
        identity: what made the run this run when it was saved.
        stages: of the sample stream.
        guard: history of the spike guard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    progress: Progress
    identity: RunIdentity
    stages: tuple[StageUse, ...]
    guard: dict[str, Any]

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON values, for a checkpoint's state.json."""
        return self.model_dump(mode="json")


def saved_state(checkpoint: Checkpoint | None) -> TrainerState | None:
    """The loop's state in a checkpoint; None at a run's first start.

    Raises:
        Corrupted: it can't be understood.
    """
    if checkpoint is None:
        return None
    try:
        return TrainerState.model_validate(checkpoint.state.trainer)
    except ValidationError as error:
        raise Corrupted(f"{checkpoint.folder}: its state is not that of a training run: {error}") from error
