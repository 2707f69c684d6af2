"""The strength that keeps a bound: found on half the rows, checked on the others, as plain scoring has it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamapro.data.dataset import Dataset
from llamapro.errors import CheckFailed, DataError
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.measure import Settings, TextSet, load_model, loss_of, text_batches
from llamapro.evaluation.strength import StrengthDial
from llamapro.evaluation.strength_bound import find_strength
from llamapro.evaluation.text import evaluate_text, relative_change, score_rows
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.export.export import export
from llamapro.ranks import Ranks
from tests.support.exports import TinyRun, make_run
from tests.support.texts import ARTICLES, write_text_dataset

SETTINGS = Settings(sequence_length=32, sequences=64, precision="keep", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bound")
    tiny: TinyRun = make_run(root, dtype=torch.float32)
    write_text_dataset(root / "wiki", tiny.base, ARTICLES)
    write_text_dataset(root / "short", tiny.base, ("one",))
    export(tiny.folder, root / "out")
    return root / "out"


def text_set(exported: Path, name: str) -> TextSet:
    return TextSet(name, name, Dataset.open(exported.parent / name), "heldout")


def record_of(folder: Path) -> ExpansionRecord:
    record = read_record(folder)
    assert record is not None
    return record


def increases(exported: Path, strength: float) -> tuple[Estimate, Estimate]:
    """Of the even and of the odd rows, from one scoring of all of them."""
    model = load_model(exported, "float32", SETTINGS.device)
    dial, batches = StrengthDial(model, record_of(exported)), text_batches(text_set(exported, "wiki"), SETTINGS)
    scores = []
    for value in (strength, 0.0):
        with dial.at(value):
            scores.append(evaluate_text(loss_of(model, SETTINGS.device), batches, Ranks.solo()))
    halves = [[score_rows(score.rows[half::2]) for score in scores] for half in (0, 1)]
    even, odd = (relative_change(*pair) for pair in halves)
    return even, odd


def upper_end(increase: Estimate) -> float:
    assert increase.half_width is not None
    return increase.value + increase.half_width


def test_the_bound_holds_where_it_was_sought_and_the_other_rows_are_measured_apart(exported: Path) -> None:
    probe = text_set(exported, "wiki")
    whole = upper_end(increases(exported, 1.0)[0])
    assert whole > 5e-4, "random blocks make the text worse"
    bound = 0.4 * whole
    found = find_strength(exported, record_of(exported), [probe], SETTINGS, bound)
    assert 0 < found.strength < 1 and found.tried >= 6
    deciding, unseen = increases(exported, found.strength)
    # Rows that are computed with others are rounded otherwise: 1e-7 of the losses.
    assert found.measured["wiki"].value == pytest.approx(deciding.value, abs=2e-6)
    assert found.unseen["wiki"].value == pytest.approx(unseen.value, abs=2e-6)
    assert upper_end(found.measured["wiki"]) <= bound < upper_end(increases(exported, found.strength + 1 / 256)[0])
    assert found.measured["wiki"] != found.unseen["wiki"]


def test_a_bound_that_the_trained_model_keeps_leaves_it_whole(exported: Path) -> None:
    found = find_strength(exported, record_of(exported), [text_set(exported, "wiki")], SETTINGS, 100.0)
    assert (found.strength, found.tried) == (1.0, 1)


def test_a_bound_that_nothing_keeps_and_a_probe_of_too_few_rows_are_refused(exported: Path) -> None:
    record = record_of(exported)
    with pytest.raises(CheckFailed, match="no strength above 0"):
        find_strength(exported, record, [text_set(exported, "wiki")], SETTINGS, -0.5)
    with pytest.raises(DataError, match="fills 1 row of 32 tokens, and 4 are needed"):
        find_strength(exported, record, [text_set(exported, "short")], SETTINGS, 0.1)
    with pytest.raises(DataError, match="fills 3 rows"):
        find_strength(exported, record, [text_set(exported, "wiki")], replace(SETTINGS, sequences=3), 0.1)
