"""One rank of `benchmarks.checkpoint`: an engine in training, and each way to save its state."""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.checkpoint import AT_ONCE, CONTESTANTS, DEEPSPEED, OURS, RAW, WITHOUT_FROZEN, Outcome, base_sizes
from benchmarks.training_run import Workload, run_config, run_facts
from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.frozen import prove_frozen
from llamapro.checkpoint.save import save_checkpoint, stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.engine.engine import Engine
from llamapro.engine.start import start_ranks, stop_ranks
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.files.atomic import fsync_folder, fsync_tree
from llamapro.ranks import Ranks
from llamapro.training.device import present_device
from llamapro.training.mock_step import random_batch
from llamapro.training.opening import start_engine
from llamapro.training.preflight import Facts
from llamapro.training.step import to_device

BASELINE_STEPS = 3
RATE = 1e-4


@dataclass(frozen=True)
class Training:
    """A job in training.

    Attributes:
        memory: for our copies, taken once as the trainer does.
    """

    engine: Engine
    facts: Facts
    record: ExpansionRecord
    ranks: Ranks
    memory: SnapshotMemory
    folder: Path

    def step(self) -> None:
        """Take one step on random tokens; over when all ranks are done."""
        batch = random_batch(self.facts)
        inputs, _ = to_device(batch, self.ranks.device)
        loss = self.engine.forward_loss(*inputs)
        self.engine.backward(loss.loss_sum, self.ranks.world_size * batch.valid_tokens)
        self.engine.step(RATE)
        self.meet()

    def meet(self) -> None:
        """Wait for all ranks and for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.ranks.barrier()

    def prove(self) -> None:
        """What the trainer does before each save."""
        names = self.engine.model.trainable_tensors()
        proof = prove_frozen(self.engine.frozen_slices(), self.record, self.ranks, names)
        assert proof.equal == proof.total > 0, str(proof)

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long something takes until it is done on all ranks."""
        self.meet()
        began = time.perf_counter()
        work()
        self.meet()
        return time.perf_counter() - began


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; the same on every rank."""
    record = read_record(folder / "expanded")
    assert record is not None
    sizes = {**base_sizes(arguments), "num_hidden_layers": record.blocks}
    workload = Workload(sizes, record.new_blocks, arguments.length, 1)
    config = run_config(folder / "expanded", workload, arguments.ranks, zero_stage=arguments.stage, compile="off")
    facts = replace(run_facts(config, workload, present_device(arguments.ranks), arguments.ranks, 1), record=record)
    ranks = start_ranks(config.engine)
    engine = start_engine(config, facts, ranks, 1).engine
    training = Training(engine, facts, record, ranks, SnapshotMemory.for_state(engine), folder / "saved")
    training.step()
    training.step()
    saves = {RAW: raw, OURS: ours, AT_ONCE: at_once, DEEPSPEED: deepspeeds, WITHOUT_FROZEN: without_frozen}
    rounds, steps, order = [], [], list(CONTESTANTS)
    for _ in range(arguments.rounds):
        found = {}
        for name in order:
            baseline = median(training.seconds(training.step) for _ in range(BASELINE_STEPS))
            steps.append(baseline)
            found[name] = _save_once(training, saves[name], baseline)
        rounds.append(found)
        order = order[1:] + order[:1]
    trainable = sum(ranks.sum_integers([sum(fragment.count for fragment in engine.fragments())]))
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.model.parameters())
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    result = {
        "rounds": rounds,
        "step_seconds": median(steps),
        "proof_seconds": median(training.seconds(training.prove) for _ in range(BASELINE_STEPS)),
        "trainable": trainable,
        "all": parameters,
        "device": device,
    }
    engine.close()
    stop_ranks()
    return result


def _save_once(training: Training, save: Callable[[Training, float], Outcome], baseline: float) -> Outcome:
    """One contestant on a disk that has nothing else to do; what it wrote is deleted."""
    if training.ranks.rank == 0:
        training.folder.mkdir()
        os.sync()
    training.meet()
    outcome = save(training, baseline)
    training.meet()
    files = [path for path in training.folder.rglob("*") if path.is_file()]
    outcome["bytes"] = float(sum(path.stat().st_size for path in files))
    training.meet()
    if training.ranks.rank == 0:
        shutil.rmtree(training.folder)
    return outcome


def raw(training: Training, baseline: float) -> Outcome:
    """The bytes from host memory into one file per rank, synced."""
    tensors = [tensor for part in training.engine.fragments() for tensor in part.tensors.values()]
    chunks = training.memory.copy(tensors)

    def write() -> None:
        with (training.folder / f"rank-{training.ranks.rank}").open("wb", buffering=0) as file:
            for chunk in chunks:
                data = chunk.numpy().data.cast("B")
                while data:
                    data = data[file.write(data) :]
            os.fsync(file.fileno())
        fsync_folder(training.folder)

    return _standing_still(training.seconds(write))


def ours(training: Training, baseline: float) -> Outcome:
    """As the trainer saves: it goes on with training until all ranks have written, then commits."""
    saves: list[BackgroundSave] = []

    def begin() -> None:
        training.prove()
        root = training.folder / "checkpoints"
        staged = stage_save(root, 1, training.engine, {}, training.record, training.ranks)
        saves.append(BackgroundSave(staged, training.memory))

    stalled = training.seconds(begin)
    began, steps = time.perf_counter(), 0
    while training.ranks.any(not saves[0].written) or not steps:
        training.step()
        steps += 1
    training.meet()
    writing = time.perf_counter() - began
    commit = training.seconds(saves[0].commit)
    lost = max(0.0, writing - steps * baseline)
    return {"stalled": stalled + commit, "lost": stalled + commit + lost, "safe": stalled + writing + commit}


def at_once(training: Training, baseline: float) -> Outcome:
    """Ours while training waits."""

    def save() -> None:
        training.prove()
        root = training.folder / "checkpoints"
        save_checkpoint(root, 1, training.engine, {}, training.record, training.ranks)

    return _standing_still(training.seconds(save))


def deepspeeds(training: Training, baseline: float) -> Outcome:
    """DeepSpeed's own, frozen weights and all."""
    return _deepspeed_save(training, exclude=False)


def without_frozen(training: Training, baseline: float) -> Outcome:
    """DeepSpeed's own without the frozen weights: nothing then says to which base the rest belongs."""
    return _deepspeed_save(training, exclude=True)


def _deepspeed_save(training: Training, *, exclude: bool) -> Outcome:
    engine = training.engine._deepspeed
    folder = str(training.folder)
    stalled = training.seconds(lambda: engine.save_checkpoint(folder, tag="save", exclude_frozen_parameters=exclude))
    synced = training.seconds(lambda: fsync_tree(training.folder) if training.ranks.rank == 0 else None)
    return {"stalled": stalled, "lost": stalled, "safe": stalled + synced}


def _standing_still(seconds: float) -> Outcome:
    return {"stalled": seconds, "lost": seconds, "safe": seconds}
