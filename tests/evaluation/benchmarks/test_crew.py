"""Sharing requests among ranks changes no answer, and what is written down is not asked again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import CheckFailed
from llamapro.evaluation.benchmarks.crew import CHUNK, Crew, KeptAnswers
from llamapro.ranks import Ranks
from tests.support.pool import WorkerPool

REQUESTS = [[f"context {number}", " answer"] for number in range(3 * CHUNK + 5)]


class Counting:
    """Answers a request by its own number; notes who asked."""

    def __init__(self) -> None:
        self.chunks: list[tuple[str, int]] = []

    def load(self, folder: str, dtype: str) -> "Counting":
        assert (folder, dtype) == ("model", "float32")
        return self

    def __call__(self, kind: str, requests: Sequence[Sequence[Any]], seed: int) -> list[Any]:
        self.chunks.append((kind, seed))
        return [[-float(request[0].split()[1]), seed % 2 == 0] for request in requests]


def wanted() -> list[list[Any]]:
    return [[-float(number), number // CHUNK % 2 == 0] for number in range(len(REQUESTS))]


def ask(crew: Crew, folder: Path, identity: str = "a") -> list[Any]:
    crew.load(Path("model"), "float32")
    return KeptAnswers(crew, folder, identity, lambda amount: None)("loglikelihood", REQUESTS)


def share(ranks: Ranks, folder: str) -> tuple[list[Any], list[tuple[str, int]]]:
    counting = Counting()
    crew = Crew(ranks, counting.load)
    answers: list[Any] = []
    if ranks.rank == 0:
        with crew.at_work():
            answers = ask(crew, Path(folder))
    else:
        crew.serve()
    return answers, counting.chunks


@pytest.mark.parametrize("world_size", [2, 3])
def test_answers_do_not_depend_on_the_number_of_ranks(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    found = pool.run(share, str(tmp_path), world_size=world_size)
    assert found[0][0] == wanted()
    done = [seed for _, chunks in found for _, seed in chunks]
    assert sorted(done) == [0, 1, 2, 3], "every chunk once"
    assert all(chunks for _, chunks in found), "every rank has a share"


def test_what_is_written_is_not_asked_again(tmp_path: Path) -> None:
    counting = Counting()
    crew = Crew(Ranks.solo(), counting.load)
    assert ask(crew, tmp_path) == wanted()
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(counting.chunks) == 4
    files[1].unlink()
    files[2].write_text("torn")
    counting.chunks.clear()
    assert ask(crew, tmp_path) == wanted()
    assert len(counting.chunks) == 2
    counting.chunks.clear()
    ask(crew, tmp_path, "another model")
    assert len(counting.chunks) == 4


def test_interrupted_asking_goes_on_where_it_was(tmp_path: Path) -> None:
    class Dying(Counting):
        def __call__(self, kind: str, requests: Sequence[Sequence[Any]], seed: int) -> list[Any]:
            if len(self.chunks) == 2:
                raise KeyboardInterrupt
            return super().__call__(kind, requests, seed)

    with pytest.raises(KeyboardInterrupt):
        ask(Crew(Ranks.solo(), Dying().load), tmp_path)
    counting = Counting()
    assert ask(Crew(Ranks.solo(), counting.load), tmp_path) == wanted()
    assert [seed for _, seed in counting.chunks] == [2, 3]


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_broken_outputs_are_no_score(tmp_path: Path, broken: float) -> None:
    class Broken(Counting):
        def __call__(self, kind: str, requests: Sequence[Sequence[Any]], seed: int) -> list[Any]:
            return [[broken, False] for _ in requests]

    with pytest.raises(CheckFailed, match="outputs are broken"):
        ask(Crew(Ranks.solo(), Broken().load), tmp_path)
    assert not list(tmp_path.iterdir())


def fail_on_the_first_rank(ranks: Ranks) -> str:
    crew = Crew(ranks, Counting().load)
    if ranks.rank:
        crew.serve()
        return "gone"
    try:
        with crew.at_work():
            raise ValueError("no such task")
    except ValueError:
        return "failed"


def test_helpers_go_when_the_first_rank_fails(pool: WorkerPool) -> None:
    assert pool.run(fail_on_the_first_rank) == ["failed", "gone"]
