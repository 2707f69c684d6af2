"""Whole training runs on tiny models, in the worker pool: what `launch/pretrain.py` runs after its arguments."""

from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import torch

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.layout import folder_name
from llamapro.checkpoint.tensors import CheckpointTensors
from llamapro.config.load import load_config
from llamapro.expansion.expand import expand
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.loop import train
from llamapro.training.metrics import read_metrics
from llamapro.training.opening import open_session
from llamapro.training.preflight import check_facts
from llamapro.training.session import Session
from llamapro.training.signals import StopRequest
from llamapro.training.sources import write_packs
from llamapro.training.tokenizer import model_tokenizer_identity
from tests.support.config import write_config
from tests.support.datasets import write_dataset
from tests.support.models import save_tiny_llama

SEQUENCE_LENGTH = 64


def prepare(folder: Path, **model: Any) -> Path:
    """A base, its expansion by two blocks and two datasets, in `folder`."""
    save_tiny_llama(folder / "base", blocks=4, **model)
    return prepare_around_base(folder)


def prepare_around_base(folder: Path) -> Path:
    """The expansion by two blocks of the base in `folder`, and two datasets."""
    expand(str(folder / "base"), folder / "expanded", new_blocks=2)
    identity = model_tokenizer_identity(folder / "expanded")
    write_dataset(folder / "law", identity, train=120, heldout=8)
    write_dataset(folder / "wiki", identity, train=60, heldout=8, seed=5)
    return folder


def settings(folder: Path, run: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of eight float32 steps on what `prepare` made; each argument lays values over its section."""
    values: dict[str, Any] = {
        "run": {"folder": str(folder / run), "seed": 7},
        "model": {"path": str(folder / "expanded")},
        "data": {
            "sequence_length": SEQUENCE_LENGTH,
            "sources": {
                "law": {"path": str(folder / "law"), "weight": 0.7},
                "wiki": {"path": str(folder / "wiki"), "weight": 0.3},
            },
        },
        "validation": {"every_steps": 4, "sequences": 5},
        "batch": {"global_sequences": 7, "micro_sequences": 2},
        "schedule": {"steps": 8, "learning_rate": 1e-2},
        "engine": {"precision": "float32", "zero_stage": 1},
        "checkpoint": {"every_steps": 4},
        "logging": {"trackers": []},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def run_training(ranks: Ranks, values: dict[str, Any], stop_before_step: int | None = None) -> list[dict[str, Any]]:
    """Start or continue a run; returns metrics.jsonl. A pool job.

    Args:
        stop_before_step: ask rank 0 to stop before that step's second micro-batch.
    """
    with ExitStack() as stack:
        session, progress = open_run(ranks, values)
        stack.callback(session.metrics.close)
        if stop_before_step is not None:
            session = replace(session, stop=AskedBefore(session, stop_before_step))  # type: ignore[arg-type]
        train(session, progress)
    return read_metrics(session.folder.metrics_file)


def open_run(ranks: Ranks, values: dict[str, Any]) -> tuple[Session, Any]:
    """The session of a run, and where it continues."""
    folder = RunFolder(Path(values["run"]["folder"]))
    config_folder = folder.path.with_name(f"{folder.path.name}-config-{ranks.rank}")
    config_folder.mkdir(parents=True, exist_ok=True)
    config = load_config(write_config(config_folder, orjson.dumps(values).decode()))
    facts = check_facts(config, "pretrain", ranks.world_size)
    if ranks.rank == 0:
        folder.create()
        write_packs(config, facts, folder)
    ranks.barrier()
    checkpoint = find_checkpoint(folder.checkpoints, ranks)
    return open_session(config, facts, folder, ranks, StopRequest(), None, checkpoint)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    """The training loss of every step, in order."""
    return [line["loss"] for line in metrics if "gradient_norm" in line]


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """The float32 masters of a run's newest checkpoint, whole, by name."""
    newest = max((run / "checkpoints").glob("step-*"))
    tensors = CheckpointTensors(open_checkpoint(newest))
    return {
        name: torch.from_numpy(tensors.read(name, "master", 0, torch.Size(tensors.shape(name)).numel()))
        for name in tensors.names()
    }


def state_digest(run: Path, step: int | None = None) -> str:
    """One digest of weights and moments of a run's checkpoint (default: the newest), however they are cut."""
    folders = run / "checkpoints"
    folder = max(folders.glob("step-*")) if step is None else folders / folder_name(step)
    tensors, state = CheckpointTensors(open_checkpoint(folder)), sha256()
    for name in sorted(tensors.names()):
        for key in ("master", "exp_avg", "exp_avg_sq"):
            state.update(tensors.read(name, key, 0, torch.Size(tensors.shape(name)).numel()).tobytes())
    return state.hexdigest()


class AskedBefore:
    """A stop request that comes on rank 0 in the middle of a step's accumulation."""

    def __init__(self, session: Session, step: int) -> None:
        self._session = session
        self._micro_batches = step * session.facts.accumulation_steps + 2
        self.reason = ""

    def heartbeat(self) -> None:
        """Nothing to do: no watchdog runs."""

    @property
    def requested(self) -> bool:
        """Asked once before each micro-batch, and while validating, which doesn't count."""
        if torch.is_grad_enabled():
            self._micro_batches -= 1
        asked = self._micro_batches <= 0 and self._session.ranks.rank == 0
        self.reason = "the test asks" if asked else ""
        return asked

    def acknowledge(self) -> None:
        """Nothing to do: no watchdog runs."""
