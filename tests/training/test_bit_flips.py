"""One flipped bit in any file that a run reads: refused before a step is taken, or of no effect at all.

A run that was stopped is continued after the flip. It must end with a typed error and nothing trained, or, where the
bit says nothing (a blank in JSON, text of steps that are past), be the undisturbed run to the last bit.
"""

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import pytest

from llamapro import errors
from llamapro.checkpoint import discover
from llamapro.checkpoint import folder as checkpoint_folder
from llamapro.ranks import Ranks
from llamapro.training import opening
from llamapro.training.metrics import read_metrics
from tests.support.data import flip_bit
from tests.support.pool import WorkerError, WorkerPool
from tests.support.resumes import without_clocks
from tests.support.training import prepare, run_training, settings, state_digest

STOP, STEPS = 3, 4
KINDS = (
    "expanded/model.safetensors",
    "expanded/config.json",
    "expanded/expansion.json",
    "expanded/tokenizer.json",
    "law/manifest.json",
    "law/shards/train-00000.lps",
    "run/latest",
    "run/checkpoints/step-00000003/rank-00000.safetensors",
    "run/checkpoints/step-00000003/index.json",
    "run/checkpoints/step-00000003/state.json",
    "run/checkpoints/step-00000003/manifest.json",
    "run/checkpoints/step-00000003/expansion.json",
)
ALWAYS_REFUSED = {name for name in KINDS if "step-00000003" in name and "manifest" not in name} | {
    "expanded/model.safetensors",
}
FLIPS_QUICK, FLIPS_SLOW = 1, 9
TYPED = tuple(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LlamaproError)
)


@dataclass(frozen=True)
class Prepared:
    """A stopped run with all that it reads, and what it comes to when nothing is flipped."""

    folder: Path
    numbers: list[dict[str, Any]]
    state: str


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Prepared:
    folder = prepare(tmp_path_factory.mktemp("whole"))
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, run_settings(folder), STOP, world_size=1)
    straight = folder.with_name("straight")
    shutil.copytree(folder, straight)
    numbers = without_clocks(pool.run(run_training, run_settings(straight), world_size=1)[0])
    assert [line["step"] for line in numbers if "gradient_norm" in line] == list(range(1, STEPS + 1))
    return Prepared(folder, numbers, state_digest(straight / "run"))


def run_settings(folder: Path) -> dict[str, Any]:
    return settings(folder, schedule={"steps": STEPS}, validation={"every_steps": 100, "sequences": 1})


def refusal(pool: WorkerPool, folder: Path) -> str:
    """The error with which a run in a folder is refused; empty when it was continued to its end."""
    try:
        pool.run(run_training, run_settings(folder), world_size=1)
    except WorkerError as error:
        return str(error)
    return ""


def check_flip(pool: WorkerPool, prepared: Prepared, folder: Path, name: str, bit: int) -> bool:
    """Flip one bit of a fresh copy and continue; whether it was refused."""
    shutil.copytree(prepared.folder, folder)
    flip_bit(folder / name, bit // 8, bit % 8)
    error = refusal(pool, folder)
    steps = [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl") if "gradient_norm" in line]
    where = f"bit {bit} of {name}"
    if error:
        last = error.strip().splitlines()
        assert re.search(rf"^llamapro\.errors\.({'|'.join(TYPED)}): ", error, re.MULTILINE), f"{where}: {last[-1]}"
        assert max(steps) == STOP, f"{where} was refused after step {max(steps)}"
    else:
        assert name not in ALWAYS_REFUSED, f"{where} was not noticed"
        assert without_clocks(read_metrics(folder / "run" / "metrics.jsonl")) == prepared.numbers, where
        assert state_digest(folder / "run") == prepared.state, where
    shutil.rmtree(folder)
    return bool(error)


@pytest.mark.parametrize(
    ("first", "count"), [(0, FLIPS_QUICK), pytest.param(1, FLIPS_SLOW, marks=pytest.mark.slow)], ids=["quick", "full"]
)
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_refused_or_of_no_effect(
    pool: WorkerPool, prepared: Prepared, tmp_path: Path, name: str, first: int, count: int
) -> None:
    chance = random.Random(f"{name} {first}")
    bits = 8 * (prepared.folder / name).stat().st_size
    refused = [check_flip(pool, prepared, tmp_path / f"flip-{n}", name, chance.randrange(bits)) for n in range(count)]
    if name in ALWAYS_REFUSED:
        assert all(refused)


@contextmanager
def unchecked() -> Iterator[None]:
    """Neither checkpoints nor weights are compared with their digests."""
    build = opening.build_model

    def without_record(*arguments: Any, **more: Any) -> Any:
        return build(*arguments, **{**more, "record": None})

    with (
        patch.object(discover, "check_digest", lambda *_: None),
        patch.object(checkpoint_folder, "check_digest", lambda *_: None),
        patch.object(opening, "build_model", without_record),
        patch("llamapro.training.loop.prove_frozen_weights", lambda *_: None),
        patch("llamapro.training.saving.prove_frozen_weights", lambda *_: None),
    ):
        yield


def run_unchecked(ranks: Ranks, values: dict[str, Any]) -> None:
    with unchecked():
        run_training(ranks, values)


def place_of(weights: Path, tensor: str | None) -> int:
    """A byte with high bits of a number of this tensor, or of the file's last one."""
    data = weights.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = orjson.loads(data[8 : 8 + header_bytes])
    end = header[tensor]["data_offsets"][1] if tensor else len(data) - 8 - header_bytes
    return int(8 + header_bytes + end - 2)


@pytest.mark.parametrize("name", ["expanded/model.safetensors", "run/checkpoints/step-00000003/rank-00000.safetensors"])
def test_without_the_check_the_flip_is_accepted_and_changes_the_result(
    pool: WorkerPool, prepared: Prepared, tmp_path: Path, name: str
) -> None:
    """Control: the refusals above have no other cause. The bit is in the exponent, or high in the mantissa."""
    folder = tmp_path / "flipped"
    shutil.copytree(prepared.folder, folder)
    tensor = "model.norm.weight" if name.startswith("expanded") else None
    flip_bit(folder / name, place_of(folder / name, tensor), 6)
    assert "Corrupted" in refusal(pool, folder) or "CheckFailed" in refusal(pool, folder)
    pool.run(run_unchecked, run_settings(folder), world_size=1)
    assert state_digest(folder / "run") != prepared.state
