"""A bit that flips in memory while a run trains: in a frozen tensor always caught at the next save, elsewhere not.

What is trained changes at every step, so nothing can say what it should be: a flip there is one more wrong update. The
guard sees it where it is large enough to be a spike, and a checkpoint holds what was in memory.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.engine.engine import Engine
from llamapro.ranks import Ranks
from llamapro.training.progress import Progress
from llamapro.training.proof import prove_frozen_weights
from tests.support.pool import WorkerPool
from tests.support.training import open_run, prepare, settings

INTEGERS = {2: torch.int16, 4: torch.int32}
BITS_PER_TENSOR = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("corrupted"))


def flip_and_prove(ranks: Ranks, values: dict[str, Any], bits: int) -> tuple[int, list[str]]:
    """Flip single bits of every frozen tensor, one after the other, and ask for the proof; what was not noticed."""
    session, _ = open_run(ranks, values)
    prove_frozen_weights(session, Progress())
    chance, tried, unnoticed = random.Random(5), 0, []
    names = sorted({name for name, _, _ in session.engine.frozen_slices()})
    for name in [name for names in ranks.all_gather_json(names)[:1] for name in names]:
        for _ in range(bits):
            holder, place, bit = chance.randrange(ranks.world_size), chance.random(), chance.random()
            held = [values for one, _, values in session.engine.frozen_slices() if one == name]
            mine = held[0] if held and ranks.rank == holder else torch.empty(0)
            restore = _flip(mine, place, bit)
            noticed = _noticed(session)
            restore()
            flipped = ranks.any(mine.numel() > 0)
            tried += flipped
            if flipped and name not in noticed:
                unnoticed.append(name)
    prove_frozen_weights(session, Progress())
    session.metrics.close()
    return tried, unnoticed


def _flip(values: torch.Tensor, place: float, bit: float) -> Any:
    if not values.numel():
        return lambda: None
    integers = values.view(INTEGERS[values.element_size()])
    index, mask = int(place * len(integers)), 1 << int(bit * (8 * values.element_size() - 1))

    def flip() -> None:
        integers[index] ^= mask

    flip()
    return flip


def _noticed(session: Any) -> str:
    from llamapro.errors import CheckFailed

    try:
        prove_frozen_weights(session, Progress())
    except CheckFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("stage", "bits"),
    [(1, 1), (3, 1), pytest.param(2, 20, marks=pytest.mark.slow), pytest.param(3, 20, marks=pytest.mark.slow)],
)
def test_every_flip_in_a_frozen_tensor_is_caught_on_every_rank(
    folder: Path, pool: WorkerPool, stage: int, bits: int
) -> None:
    values = settings(folder, f"flips-{stage}-{bits}", engine={"precision": "float32", "zero_stage": stage})
    for tried, unnoticed in pool.run(flip_and_prove, values, bits):
        assert unnoticed == []
        assert tried > 30 * bits


def flip_a_moment(ranks: Ranks, values: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a flip in a moment changed what would be saved, and whether the proof said anything."""
    session, _ = open_run(ranks, values)
    fragment = next(iter(session.engine.fragments()))
    before = fragment.tensors["exp_avg_sq"].clone()
    fragment.tensors["exp_avg_sq"].view(torch.int32)[0] ^= 1 << 29
    after = next(iter(session.engine.fragments())).tensors["exp_avg_sq"]
    session.metrics.close()
    return not torch.equal(before, after), bool(_noticed(session))


def test_a_flip_in_a_moment_is_not_claimed_to_be_caught(folder: Path, pool: WorkerPool) -> None:
    assert pool.run(flip_a_moment, settings(folder, "moment")) == [(True, False)] * 2


def flip_a_gradient(ranks: Ranks, values: dict[str, Any]) -> list[str]:
    """Reasons for which steps were skipped when one gradient of the last rank has a high exponent bit flipped."""
    from unittest.mock import patch

    from llamapro.training.loop import train
    from llamapro.training.metrics import read_metrics

    session, progress = open_run(ranks, values)
    backward, taken = Engine.backward, [0]

    def flipped(engine: Engine, loss_sum: torch.Tensor, tokens: int) -> None:
        taken[0] += 1
        hit = taken[0] == 6 * session.facts.accumulation_steps and ranks.rank == ranks.world_size - 1
        backward(engine, loss_sum * (2.0**64 if hit else 1.0), tokens)

    with patch.object(Engine, "backward", flipped):
        train(session, progress)
    session.metrics.close()
    return [line["reason"] for line in read_metrics(session.folder.metrics_file) if line.get("event") == "skip"]


def test_a_gradient_with_a_flipped_exponent_is_a_spike_on_all_ranks(folder: Path, pool: WorkerPool) -> None:
    """A scale of 2⁶⁴ is what the second-highest bit of a float32 exponent makes of a number."""
    values = settings(folder, "gradient", guards={"spike_window_steps": 4, "spike_sigma": 6.0})
    for reasons in pool.run(flip_a_gradient, values):
        assert len([reason for reason in reasons if reason.startswith("gradient norm")]) == 1, reasons
