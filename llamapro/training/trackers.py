"""Trackers by name. Imported only when asked for; what is missing is an error, never a silent loss of metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamapro.errors import UserError
from llamapro.training.metrics import Tracker


class TensorBoard:
    """Scalars in TensorBoard's event files; a resumed run purges what it will compute again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record these numbers at this step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


def open_trackers(names: Sequence[str], tensorboard_folder: Path, first_step: int) -> list[Tracker]:
    """Open the trackers of a run.

    Args:
        first_step: the first step whose numbers will be logged; later ones already there are purged.

    Raises:
        UserError: a name that is not a tracker.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name != "tensorboard":
            raise UserError(f"logging.trackers: {name!r} is not available in this version; use tensorboard, or none")
        trackers.append(TensorBoard(tensorboard_folder, first_step))
    return trackers
