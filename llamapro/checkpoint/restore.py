"""Load a checkpoint into a running engine, at any world size and ZeRO stage."""

import torch

from llamapro.checkpoint.folder import Checkpoint
from llamapro.checkpoint.state import TrainingState
from llamapro.checkpoint.tensors import CheckpointTensors
from llamapro.errors import CheckFailed
from llamapro.ranks import Ranks


def load_checkpoint(checkpoint: Checkpoint, state: TrainingState, ranks: Ranks) -> None:
    """Replace weights and optimizer state by the checkpoint's, on every rank. Collective.

    A `Checkpoint` has been compared with its digests, so no damaged byte reaches the engine. Each rank reads only the
    bytes it needs.

    Raises:
        CheckFailed: the checkpoint holds other parameters than this run trains; nothing was loaded.
        Corrupted: a file could not be read.
    """
    _require_same_parameters(checkpoint, state, ranks)
    tensors = CheckpointTensors(checkpoint)

    def read(name: str, key: str, start: int, count: int) -> torch.Tensor:
        return torch.from_numpy(tensors.read(name, key, start, count))

    state.load(read, checkpoint.state.optimizer_steps)


def _require_same_parameters(checkpoint: Checkpoint, state: TrainingState, ranks: Ranks) -> None:
    own = {fragment.name: list(fragment.shape) for fragment in state.fragments()}
    live: dict[str, list[int]] = {}
    for shapes in ranks.all_gather_json(own):
        live.update(shapes)
    saved = {name: list(parameter.shape) for name, parameter in checkpoint.index.parameters.items()}
    where = f"{checkpoint.folder} can't be loaded into this run"
    if missing := sorted(set(live) - set(saved)):
        raise CheckFailed(f"{where}: it does not hold {_some(missing)}, which this run trains")
    if strange := sorted(set(saved) - set(live)):
        raise CheckFailed(f"{where}: it holds {_some(strange)}, which this run does not train")
    for name, shape in live.items():
        if saved[name] != shape:
            raise CheckFailed(f"{where}: {name} has shape {saved[name]} there and {shape} here")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
