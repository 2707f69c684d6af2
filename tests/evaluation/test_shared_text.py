"""Rows shared among ranks have the very scores that one process gives them, in the same order."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from llamapro.data.dataset import Dataset
from llamapro.evaluation.benchmarks.crew import Answering, Crew
from llamapro.evaluation.compare import evaluate_model
from llamapro.evaluation.measure import Settings, TextSet, measure, text_batches
from llamapro.evaluation.results import Results
from llamapro.ranks import Ranks
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool
from tests.support.texts import write_text_dataset

SETTINGS = Settings(sequence_length=64, sequences=1000, precision="keep", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    save_tiny_llama(root / "model")
    save_tiny_llama(root / "base", seed=1)
    texts = tuple(f"Sentence {number} says {number * number}, and then it ends. " * 8 for number in range(120))
    write_text_dataset(root / "many", root / "model", texts)
    write_text_dataset(root / "few", root / "model", texts[:3])
    return root


def text_sets(root: Path) -> list[TextSet]:
    return [TextSet(name, str(root / name), Dataset.open(root / name), "heldout") for name in ("many", "few")]


def no_benchmarks(folder: str, dtype: str) -> Answering:
    raise AssertionError(f"{folder} in {dtype} is not asked for here")


def share(ranks: Ranks, root: str, output: str) -> str | None:
    crew = Crew(ranks, no_benchmarks)
    if ranks.rank:
        crew.serve()
        return None
    place = Path(root)
    models = [("model", place / "model"), ("base", place / "base")]
    with crew.at_work():
        results = evaluate_model(*models, text_sets(place), SETTINGS, Path(output), open_scorer=crew.text_scorer)
    return results.model_dump_json()


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_are_those_of_one_process(pool: WorkerPool, root: Path, tmp_path: Path, world_size: int) -> None:
    sets = text_sets(root)
    batches = {text.name: len(text_batches(text, SETTINGS)) for text in sets}
    assert batches["many"] > 3 and batches["few"] == 1, "with a share for every rank, and without"
    found = pool.run(share, str(root), str(tmp_path / "shared"), world_size=world_size)
    models = [("model", root / "model"), ("base", root / "base")]
    alone = evaluate_model(*models, sets, SETTINGS, tmp_path / "alone")
    assert found[0] is not None
    assert Results.model_validate_json(found[0]) == alone
    # Rows are kept in the same order: a base measured by any number of processes is compared row by row.
    again = measure(root / "model", "model", sets, SETTINGS, tmp_path / "shared", open_scorer=never)
    first = measure(root / "model", "model", sets, SETTINGS, tmp_path / "alone", open_scorer=never)
    assert again.scores == first.scores


def never(*_: object) -> NoReturn:
    raise AssertionError("measured again")
