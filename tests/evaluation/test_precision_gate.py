"""The gate passes only what is shown to be within its bound."""

from pathlib import Path

import pytest
import torch

from llamapro.data.dataset import Dataset
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.precision_gate import Contestants, judge, verdict
from llamapro.evaluation.text import RowScore, TextScore, score_rows
from tests.support.models import save_tiny_llama
from tests.support.texts import LAW, write_text_dataset

BOUND = 0.0025


def scores(*losses: float) -> TextScore:
    """Rows of 100 tokens with these mean losses."""
    return score_rows([RowScore(100 * loss, 100, 400.0) for loss in losses])


@pytest.mark.parametrize(
    ("judged", "passed"),
    [
        ((2.0, 3.0, 4.0), True),  # the same
        ((2.004, 3.006, 4.008), True),  # 0.2 % everywhere: nothing is uncertain
        ((2.006, 3.009, 4.012), False),  # 0.3 %
        ((1.9, 2.85, 3.8), True),  # better
        ((2.1, 2.9, 4.0), False),  # no difference in the mean, but the rows say nothing
    ],
)
def test_the_whole_interval_must_lie_below_the_bound(judged: tuple[float, ...], passed: bool) -> None:
    found = verdict("law", scores(5.0, 5.0, 5.0), scores(2.0, 3.0, 4.0), scores(*judged), BOUND)
    assert found.passed is passed
    assert str(found).endswith("bound 0.25%: passed" if passed else "bound 0.25%: not passed")


def test_one_row_shows_nothing() -> None:
    found = verdict("law", scores(5.0), scores(3.0), scores(3.0), BOUND)
    assert not found.passed and "one row, so no interval" in str(found)


def test_the_gain_that_is_kept_is_told() -> None:
    found = verdict("law", scores(4.0, 4.0), scores(3.0, 3.0), scores(3.1, 3.1), BOUND)
    assert found.kept_gain == pytest.approx(0.9)
    assert "90.0% of the gain over 4.0000" in str(found)
    assert verdict("law", scores(3.0, 3.0), scores(3.1, 3.1), scores(3.1, 3.1), BOUND).kept_gain is None


def test_models_are_measured_in_bf16_on_the_same_rows(tmp_path: Path) -> None:
    folders = [save_tiny_llama(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    law = write_text_dataset(tmp_path / "law", folders[0], heldout=LAW)
    sets = [TextSet("law", str(law), Dataset.open(law), "heldout")]
    settings = Settings(sequence_length=64, sequences=16, precision="float32", device=torch.device("cpu"))
    (same,) = judge(Contestants(folders[2], folders[0], folders[1]), sets, settings, tmp_path / "store")
    assert same.passed and same.fraction == 0 and same.bf16 == same.judged != same.untrained
    (other,) = judge(Contestants(folders[0], folders[0], folders[2]), sets, settings, tmp_path / "store")
    assert other.fraction != 0 and other.judged == same.untrained
    assert len(list((tmp_path / "store").rglob("*.json"))) == 2  # by what was measured, not by its name
