"""One model on every rank; rank 0 asks, all answer, each a part of the questions or of a text's rows.

Only rank 0 knows tasks: it cuts the requests into chunks, and the answers do not depend on how many ranks share them.
Messages are JSON.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import orjson
import torch

from llamapro.errors import CheckFailed
from llamapro.evaluation.measure import Advance, Batches, Scorer, Settings, TextSet
from llamapro.evaluation.shared_text import RowShare
from llamapro.evaluation.text import TextScore, score_rows
from llamapro.files.atomic import write_atomic
from llamapro.ranks import Ranks

CHUNK = 128
Arguments = Sequence[Any]


class Answering(Protocol):
    """A loaded model: answers requests of one kind (a method of lm-eval's LM), in their order."""

    def __call__(self, kind: str, requests: Sequence[Arguments], seed: int) -> list[Any]:
        """The answers; `seed` decides what is sampled."""


class Crew:
    """The ranks of an evaluation.

    Args:
        load: makes the model of a folder answer; called with (folder, dtype) on every rank.
    """

    def __init__(self, ranks: Ranks, load: Callable[[str, str], Answering]) -> None:
        self.ranks = ranks
        self._load = load
        self._answering: Answering | None = None
        self._rows = RowShare(ranks)

    @contextmanager
    def at_work(self) -> Iterator["Crew"]:
        """On rank 0: the others answer while this lasts, and go when it ends, however it ends."""
        assert self.ranks.rank == 0
        try:
            yield self
        finally:
            self.ranks.broadcast_json(None)

    def serve(self) -> None:
        """On the other ranks: load and answer as rank 0 says, until it is done."""
        while (message := self.ranks.broadcast_json(None)) is not None:
            self._follow(message)

    def load(self, folder: Path, dtype: str) -> None:
        """On rank 0: every rank has this model from now on."""
        self._follow(self.ranks.broadcast_json({"load": [str(folder), dtype]}))

    def answer(self, kind: str, chunks: Sequence[tuple[int, Sequence[Arguments]]]) -> list[list[Any]]:
        """On rank 0: the answers to at most as many chunks, each with its number, as there are ranks."""
        return self._follow(self.ranks.broadcast_json({"kind": kind, "chunks": chunks}))[: len(chunks)]

    @contextmanager
    def text_scorer(self, folder: Path, dtype: str, settings: Settings) -> Iterator[Scorer]:
        """On rank 0: while this lasts, every rank has this model for texts and scores its part of their rows."""

        def score(text: TextSet, batches: Batches, advance: Advance) -> TextScore:
            self.ranks.broadcast_json({"rows": self._rows.order(text, settings)})
            return score_rows(self._rows.score(batches, advance))

        self._follow(self.ranks.broadcast_json({"text_model": [str(folder), dtype, settings.device.type]}))
        try:
            yield score
        finally:
            self._rows.unload()

    def _follow(self, message: dict[str, Any]) -> list[list[Any]]:
        if "text_model" in message:
            self._answering = None  # its memory is needed
            self._rows.load(*message["text_model"])
            return []
        if "rows" in message:
            self._rows.follow(message["rows"])
            return []
        if "load" in message:
            self._answering = None
            self._rows.unload()
            self._answering = self._load(*message["load"])
            return []
        assert self._answering is not None
        mine = message["chunks"][self.ranks.rank : self.ranks.rank + 1]
        answers = [self._answering(message["kind"], chunk, number) for number, chunk in mine]
        return [answer for part in self.ranks.all_gather_json(answers) for answer in part]


class KeptAnswers:
    """Answers to a task's requests, each chunk written down when it is known: what is written is not asked again.

    Args:
        folder: for the chunks.
        identity: what decides an answer besides the request: the model, its dtype, the programs.
        advance: told the number of requests done.
    """

    def __init__(self, crew: Crew, folder: Path, identity: str, advance: Callable[[int], None]) -> None:
        self._crew = crew
        self._folder = folder
        self._identity = identity
        self._advance = advance

    def __call__(self, kind: str, requests: Sequence[Arguments]) -> list[Any]:
        """The answers, in the order of the requests."""
        chunks = [requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK)]
        known = {index: self._read(kind, index, chunk) for index, chunk in enumerate(chunks)}
        missing = [index for index, answers in known.items() if answers is None]
        self._advance(len(requests) - sum(len(chunks[index]) for index in missing))
        together = self._crew.ranks.world_size
        for start in range(0, len(missing), together):
            now = missing[start : start + together]
            for index, answers in zip(
                now, self._crew.answer(kind, [(index, chunks[index]) for index in now]), strict=True
            ):
                known[index] = self._keep(kind, index, chunks[index], answers)
                self._advance(len(answers))
        return [answer for index in sorted(known) for answer in known[index] or ()]

    def _read(self, kind: str, index: int, chunk: Sequence[Arguments]) -> list[Any] | None:
        try:
            answers: list[Any] = orjson.loads(self._place(kind, index, chunk).read_bytes())
        except (OSError, ValueError):
            return None
        return answers

    def _keep(self, kind: str, index: int, chunk: Sequence[Arguments], answers: list[Any]) -> list[Any]:
        if kind != "generate_until":
            _require_finite(chunk, answers)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._place(kind, index, chunk), orjson.dumps(answers))
        return answers

    def _place(self, kind: str, index: int, chunk: Sequence[Arguments]) -> Path:
        # The index tells sampled answers to the same request apart.
        content = orjson.dumps([self._identity, kind, index, chunk])
        return self._folder / f"{hashlib.sha256(content).hexdigest()[:24]}.json"


def _require_finite(chunk: Sequence[Arguments], answers: Sequence[Any]) -> None:
    for request, answer in zip(chunk, answers, strict=True):
        value = answer[0] if isinstance(answer, list) else answer
        if value is None or not torch.isfinite(torch.tensor(value)):
            raise CheckFailed(
                f"the model's log-likelihood of {request[-1][-200:]!r} is {value}: its outputs are broken"
            )
