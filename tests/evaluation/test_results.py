"""What was measured is kept exactly, and only for exactly what it was measured on."""

from pathlib import Path

import pytest

from llamapro.errors import Corrupted
from llamapro.evaluation.model_digest import model_digest
from llamapro.evaluation.results import (
    MeasurementKey,
    ModelResult,
    Results,
    read_results,
    store_measurement,
    stored_measurement,
    write_results,
)
from llamapro.evaluation.text import RowScore, score_rows
from tests.support.models import save_tiny_llama

KEY = MeasurementKey(
    model_digest="a" * 64,
    dataset_fingerprint="b" * 64,
    split="heldout",
    sequence_length=64,
    sequences=8,
    precision="float32",
    device="cpu",
    program="x 1",
)
SCORE = score_rows([RowScore(1 / 3, 7, 0.1), RowScore(2.7182818284590455, 11, 1e-7)])


def test_measurement_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    store_measurement(tmp_path, KEY, SCORE)
    assert stored_measurement(tmp_path, KEY) == SCORE


@pytest.mark.parametrize(
    "changed",
    [{field: "c" if isinstance(value, str) else value + 1} for field, value in KEY.model_dump().items()],
    ids=lambda changed: next(iter(changed)),
)
def test_any_other_circumstance_is_another_measurement(tmp_path: Path, changed: dict[str, object]) -> None:
    store_measurement(tmp_path, KEY, SCORE)
    assert stored_measurement(tmp_path, KEY.model_copy(update=changed)) is None


def test_unreadable_measurement_counts_as_none(tmp_path: Path) -> None:
    store_measurement(tmp_path, KEY, SCORE)
    (file,) = (tmp_path / "measurements").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert stored_measurement(tmp_path, KEY) is None


def test_results_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    results = Results(settings={"sequences": 8}, versions={}, model=ModelResult(name="m", digest="d", sets={}))
    assert read_results(tmp_path) is None
    path = write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    path.write_text("{")
    with pytest.raises(Corrupted, match=r"results\.json"):
        read_results(tmp_path)


def test_digest_ignores_how_tensors_are_cut_into_files_and_sees_one_bit(tmp_path: Path) -> None:
    whole = model_digest(save_tiny_llama(tmp_path / "whole"))
    assert model_digest(save_tiny_llama(tmp_path / "cut", max_shard_size="50KB")) == whole
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    file = tmp_path / "whole/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_digest(tmp_path / "whole") != whole
    assert model_digest(save_tiny_llama(tmp_path / "other", seed=1)) != whole
