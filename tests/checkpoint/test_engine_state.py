"""Real engines: saved at one ZeRO stage and world size, loaded at another, bit for bit; frozen weights proved live."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.frozen import prove_frozen
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.checkpoint.save import save_checkpoint
from llamapro.expansion.expand import expand
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.ranks import Ranks
from tests.support.engine import Setup, joined, local_state, start_engine, train_step
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool

STEPS_BEFORE = 2


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 4 + 2 blocks with its record."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_llama(folder / "base", dtype=torch.bfloat16)
    expand(str(base), folder / "expanded", new_blocks=2)
    return folder / "expanded"


def record_of(setup: Setup) -> ExpansionRecord:
    record = read_record(Path(setup.folder))
    assert record is not None
    return record


def train_and_save(ranks: Ranks, setup: Setup, root: str) -> tuple[Any, float]:
    """Two steps, a checkpoint, and the loss of the third."""
    engine, _ = start_engine(ranks, setup)
    for step in range(STEPS_BEFORE):
        train_step(engine, ranks, setup, step)
    save_checkpoint(Path(root), STEPS_BEFORE, engine, {}, record_of(setup), ranks)
    saved = local_state(engine)
    train_step(engine, ranks, setup, STEPS_BEFORE)
    loss, _ = train_step(engine, ranks, setup, STEPS_BEFORE + 1)
    engine.close()
    return saved, loss


def load_and_train(ranks: Ranks, setup: Setup, root: str) -> tuple[Any, float]:
    """The loaded state, and the loss after one more step."""
    engine, _ = start_engine(ranks, setup)
    checkpoint = find_checkpoint(Path(root), ranks)
    assert checkpoint is not None
    load_checkpoint(checkpoint, engine, ranks)
    loaded = local_state(engine)
    train_step(engine, ranks, setup, STEPS_BEFORE)
    loss, _ = train_step(engine, ranks, setup, STEPS_BEFORE + 1)
    engine.close()
    return loaded, loss


def setup_of(folder: Path, stage: int, world_size: int) -> Setup:
    return Setup(str(folder), stage, blocks=(2, 5), accumulation=6 // world_size)


@pytest.mark.parametrize(
    ("before", "after"),
    [((3, 2), (3, 2)), ((3, 2), (1, 1)), ((1, 1), (3, 2)), ((2, 2), (3, 1)), ((3, 1), (2, 2))],
    ids=lambda case: f"zero{case[0]}x{case[1]}",
)
def test_any_stage_and_world_size_continues_from_any_other(
    expanded: Path, tmp_path: Path, pool: WorkerPool, before: tuple[int, int], after: tuple[int, int]
) -> None:
    root = str(tmp_path / "checkpoints")
    first = pool.run(train_and_save, setup_of(expanded, *before), root, world_size=before[1])
    second = pool.run(load_and_train, setup_of(expanded, *after), root, world_size=after[1])
    saved, loaded = joined([state for state, _ in first]), joined([state for state, _ in second])
    assert saved.keys() == loaded.keys() and len(saved) == 3 * 18
    assert all(np.array_equal(saved[place], loaded[place]) for place in saved)
    assert any(values.any() for (_, key), values in saved.items() if key == "exp_avg_sq")
    straight, resumed = first[0][1], second[0][1]
    if before == after:
        assert resumed == straight
    # Other world sizes add the same float32 numbers in another order.
    assert resumed == pytest.approx(straight, rel=1e-6)


def prove_and_break(ranks: Ranks, setup: Setup) -> tuple[str, str]:
    """The proof of the live weights, and the one after a bit was flipped on the last rank only."""
    engine, model = start_engine(ranks, setup)
    record = record_of(setup)
    trainable = [name for name, _ in model.trainable_parameters()]
    before = prove_frozen(engine.frozen_slices(), record, ranks, trainable)
    name, _, values = list(engine.frozen_slices())[0]
    if ranks.rank == ranks.world_size - 1:
        values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)[-1] ^= 1
    after = prove_frozen(engine.frozen_slices(), record, ranks, trainable)
    engine.close()
    return str(before), str(after)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("stage", [1, 3])
def test_live_frozen_weights_are_proved_and_one_flipped_bit_is_named(
    expanded: Path, pool: WorkerPool, stage: int, precision: str
) -> None:
    setup = Setup(str(expanded), stage, precision, blocks=(2, 5))
    answers = pool.run(prove_and_break, setup)
    assert answers[0] == answers[1]
    before, after = answers[0]
    assert before == "39 of 39 base tensors equal the record"
    assert after.startswith("38 of 39 base tensors equal the record; different: model.embed_tokens.weight (")
