"""Begin a new run with the weights of another run's checkpoint; optimizer, schedule and data begin afresh."""

from collections.abc import Iterator
from pathlib import Path

import torch

from llamapro.checkpoint.folder import Checkpoint, open_checkpoint
from llamapro.checkpoint.layout import pointer_path, read_pointer
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.checkpoint.state import MASTER, Fragment, ReadSlice, TrainingState
from llamapro.errors import UserError
from llamapro.expansion.record import ExpansionRecord
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder


def open_start(path: Path, record: ExpansionRecord | None) -> Checkpoint:
    """The checkpoint that `checkpoint.start_from` names: its folder, or a run folder, whose newest one is meant.

    Raises:
        UserError: there is none, or it was trained on another base or another expansion of it.
        Corrupted: its bytes differ from its manifest.
    """
    folder = path
    if pointer_path(RunFolder(path).checkpoints).exists():
        folder = read_pointer(RunFolder(path).checkpoints) or path
    checkpoint = open_checkpoint(folder)
    if checkpoint.state.record_digest != (record.digest() if record else None):
        raise UserError(
            f"checkpoint.start_from: {folder} was trained on another expanded model than model.path; its blocks would "
            "stand on a base they never saw. Point model.path at the model it was trained on"
        )
    return checkpoint


def load_start(checkpoint: Checkpoint, state: TrainingState, ranks: Ranks) -> None:
    """Load a checkpoint's weights, not its optimizer state; collective."""
    load_checkpoint(checkpoint, _WeightsOnly(state), ranks)


class _WeightsOnly:
    """A training state that takes the weights of a checkpoint and begins its optimizer at step 0."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    @property
    def optimizer_steps(self) -> int:
        return 0

    def fragments(self) -> Iterator[Fragment]:
        return self._state.fragments()

    def load(self, read: ReadSlice, optimizer_steps: int) -> None:
        def weights(name: str, key: str, start: int, count: int) -> torch.Tensor:
            return read(name, key, start, count) if key == MASTER else torch.zeros(count)

        self._state.load(weights, 0)
