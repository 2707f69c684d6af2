"""One rank of a real job in a process forked from one that has imported everything: starts in a second, not in ten."""

import errno
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro.engine.environment import prepare_environment

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
prepare_environment()  # before torch is imported

import torch  # noqa: E402

from llamapro.checkpoint import background  # noqa: E402
from llamapro.checkpoint.rank_file import write_rank_file  # noqa: E402
from llamapro.engine.engine import Engine  # noqa: E402
from llamapro.files.manifest import FileEntry  # noqa: E402
from llamapro.modeling.model import LossOutput  # noqa: E402
from llamapro.training import entry, loop  # noqa: E402
from llamapro.training.startup_signals import retry_on_stop_signals  # noqa: E402


@dataclass(frozen=True)
class Disturbance:
    """Faults from inside a rank; zero steps or saves: none.

    Attributes:
        nan_step: the step (from 1) in which the loss of `nan_rank` is not a number.
        full_saves: saves of this process, from its first on, for which `full_rank` finds no space.
    """

    nan_step: int = 0
    nan_rank: int = 0
    full_rank: int = 0
    full_saves: int = 0


def run_rank(rank: int, config: str, log: str, world_size: int, port: int, disturbance: Disturbance) -> None:
    """Train as `launch/pretrain.py` does; ends the process with its exit code. Output goes to the end of `log`."""
    retry_on_stop_signals()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if rank == disturbance.nan_rank and disturbance.nan_step:
        _lose_number(disturbance.nan_step)
    if rank == disturbance.full_rank and disturbance.full_saves:
        _fill_disk(disturbance.full_saves)
    sys.exit(entry.main("pretrain", ["--config", config]))


def _lose_number(nan_step: int) -> None:
    seed_step, forward_loss, current = loop.seed_step, Engine.forward_loss, [0]

    def note(seed: int, step: int, rank: int) -> None:
        current[0] = step + 1
        seed_step(seed, step, rank)

    def forward(engine: Engine, *inputs: Any) -> LossOutput:
        output = forward_loss(engine, *inputs)
        if current[0] != nan_step or not torch.is_grad_enabled():
            return output
        return LossOutput(output.loss_sum * torch.nan, output.row_loss_sums * torch.nan, output.row_tokens)

    loop.seed_step = note
    Engine.forward_loss = forward  # type: ignore[method-assign]


def _fill_disk(saves: int) -> None:
    refused: set[str] = set()

    def write(path: Path, *rest: Any) -> FileEntry:
        found = re.search(r"step-(\d+)", path.parent.name)
        assert found is not None
        entry = write_rank_file(path, *rest)
        if len(refused | {found[1]}) <= saves:
            refused.add(found[1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return entry

    background.write_rank_file = write
