"""Documents that hold text of evaluation items: found by 13 words in a row that they share, as for GPT-3.

Words are compared in lower case and without what stands between them; characters of scripts without spaces count as
words. An item of 8 to 12 words is looked for as a whole; a shorter one can't be told from ordinary language.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_tools.parquet import row_values
from data_tools.plan import ContentOptions, InputFile, WorkUnit
from data_tools.readers import Document, Reject, read_lines, read_objects, read_unit
from data_tools.streams import open_stream
from llamapro.data.arrays import AnyArray, IntArray
from llamapro.data.permutation import mix
from llamapro.errors import DataError

GRAM_WORDS = 13
LEAST_WORDS = 8
CONTAMINATED = "contaminated"
# Han, kana, Thai, Lao, Khmer and Burmese are written without spaces.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_BETWEEN_TEXTS = 0


@dataclass(frozen=True)
class Match:
    """An evaluation item that a document shares words with.

    Attributes:
        file: number of the evaluation file; row: of the item in it, from 0.
        gram: words that are shared; grams: how many runs of words are.
    """

    file: int
    row: int
    gram: str
    grams: int


@dataclass(frozen=True)
class _Grams:
    """All runs of so many words: `keys` (grams,) sorted hashes, each once, and `places` (grams,) where it is first."""

    words: int
    keys: NDArray[np.uint64]
    places: IntArray


class EvaluationIndex:
    """The runs of words of evaluation items, in memory.

    Args:
        files: the evaluation files.

    Attributes:
        items: how many there are; too_short: those without anything that can be looked for.

    Raises:
        DataError: a file can't be read; names the line.
    """

    def __init__(self, files: Sequence[InputFile]) -> None:
        self.items = self.too_short = 0
        self._numbers: dict[str, int] = {}
        self._names: list[str] = [""]
        ids: list[int] = []
        starts: list[int] = []
        self._owners: list[tuple[int, int]] = []
        for number, file in enumerate(files):
            for row, texts in evaluation_texts(file):
                long_enough = [words for words in map(words_of, texts) if len(words) >= LEAST_WORDS]
                self.items += 1
                self.too_short += not long_enough
                for words in long_enough:
                    starts.append(len(ids))
                    self._owners.append((number, row))
                    ids += [*map(self._number, words), _BETWEEN_TEXTS]
        self._words = np.array(ids, dtype=np.int64)
        self._starts = np.array(starts, dtype=np.int64)
        self._grams = [
            grams for size in range(LEAST_WORDS, GRAM_WORDS + 1) if (grams := self._grams_of(size)) is not None
        ]

    def matches(self, text: str) -> list[Match]:
        """The items that a text shares words with; of items that have the same words, the first."""
        ids = np.fromiter(map(self._numbers.get, words_of(text), repeat(_BETWEEN_TEXTS)), dtype=np.int64)
        found: dict[tuple[int, int], Match] = {}
        for grams in self._grams:
            for place in self._shared(grams, ids):
                owner = self._owners[int(np.searchsorted(self._starts, place, side="right")) - 1]
                before = found.get(owner)
                gram = " ".join(self._names[word] for word in self._words[place : place + grams.words].tolist())
                found[owner] = Match(*owner, before.gram if before else gram, 1 + (before.grams if before else 0))
        return list(found.values())

    def _number(self, word: str) -> int:
        number = self._numbers.setdefault(word, len(self._names))
        if number == len(self._names):
            self._names.append(word)
        return number

    def _grams_of(self, size: int) -> _Grams | None:
        """All grams of texts that are long enough, or exactly so long where that is less than a whole gram."""
        places = _runs(self._words, size)
        if size < GRAM_WORDS:
            lengths = np.diff(np.append(self._starts, self._words.size)) - 1
            places = np.intersect1d(places, self._starts[lengths == size])
        if not places.size:
            return None
        keys, firsts = np.unique(_keys(self._words, places, size), return_index=True)
        return _Grams(size, keys, places[firsts])

    def _shared(self, grams: _Grams, ids: IntArray) -> list[int]:
        """Where in the items the grams stand that a text has too; a hash alone is not believed."""
        places = _runs(ids, grams.words)
        keys = _keys(ids, places, grams.words)
        at = np.minimum(np.searchsorted(grams.keys, keys), grams.keys.size - 1)
        hits = np.flatnonzero(grams.keys[at] == keys)
        pairs = zip(places[hits].tolist(), grams.places[at[hits]].tolist(), strict=True)
        size = grams.words
        return [b for a, b in pairs if np.array_equal(ids[a : a + size], self._words[b : b + size])]


def words_of(text: str) -> list[str]:
    """The words of a text, in one form: Unicode NFKC, case folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def evaluation_texts(file: InputFile) -> Iterator[tuple[int, list[str]]]:
    """The items of an evaluation file: the row of each, from 0, and all texts in it.

    A JSON line or a row of a parquet file is an item with all the strings in it; of plain text, a paragraph is one.

    Raises:
        DataError: a row can't be read; names it.
    """
    if file.format == "parquet":
        yield from ((row, _strings(values)) for row, values in enumerate(row_values(file.path)))
    elif file.format == "json":
        unit = WorkUnit(index=0, file=0, start=0, stop=None, first_row=0, text_bytes=file.text_bytes)
        for row, value in read_objects(unit, file):
            if isinstance(value, Reject):
                raise DataError(f"--decontaminate {file.path}:{row + 1}: {value.reason}; correct it")
            yield row, _strings(value)
    elif file.format == "jsonl":
        with open_stream(file.path, file.compression) as stream:
            for row, line in read_lines(stream):
                if line is None or line.strip():
                    yield row, _strings(_json(file.path, row, line))
    else:
        unit = WorkUnit(index=0, file=0, start=0, stop=None, first_row=0, text_bytes=file.text_bytes)
        for item in read_unit(unit, file, ContentOptions(text_field="", split="paragraph", heldout=0.0)):
            if isinstance(item, Reject):
                raise DataError(f"--decontaminate {file.path}:{item.row + 1}: {item.reason}; correct it")
            if isinstance(item, Document):
                yield item.row, [item.text]


def report_line(row: int, match: Match) -> bytes:
    """One line of a unit's report; `row` in the unit."""
    facts = {"row": row, "file": match.file, "item": match.row, "gram": match.gram, "grams": match.grams}
    return orjson.dumps(facts) + b"\n"


def finished_line(line: bytes, document_file: str, first_row: int, files: Sequence[InputFile]) -> bytes:
    """The line of the whole report for a line of a unit's: names and lines from 1 instead of numbers."""
    facts = orjson.loads(line)
    return (
        orjson.dumps(
            {
                "file": document_file,
                "line": first_row + facts["row"] + 1,
                "evaluation_file": files[facts["file"]].name,
                "evaluation_line": facts["item"] + 1,
                "gram": facts["gram"],
                "grams": facts["grams"],
            }
        )
        + b"\n"
    )


def _json(path: Path, row: int, line: bytes | None) -> Any:
    try:
        return orjson.loads(line if line is not None else b"")
    except orjson.JSONDecodeError as error:
        raise DataError(f"--decontaminate {path}:{row + 1}: invalid JSON ({error.msg}); correct it") from error


def _strings(value: Any) -> list[str]:
    """All strings in a value, in order."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict):
            waiting += reversed(one.values())
        elif isinstance(one, list):
            waiting += reversed(one)
    return found


def _runs(ids: IntArray, size: int) -> IntArray:
    """Where so many known words begin that follow each other."""
    unknown = np.concatenate([[0], np.cumsum(ids == _BETWEEN_TEXTS)])
    return np.flatnonzero(unknown[size:] == unknown[: unknown.size - size]) if ids.size >= size else ids[:0]


def _keys(ids: AnyArray, places: IntArray, size: int) -> NDArray[np.uint64]:
    """(places,) hashes of the runs of words that begin there."""
    keys = np.zeros(places.size, dtype=np.uint64)
    words = ids.astype(np.uint64)
    for offset in range(size):
        keys = mix(keys + words[places + offset] + np.uint64(0x9E3779B97F4A7C15))
    return keys
