"""Fill-in-the-middle: a share of the documents is rearranged, so that a model learns to write what lies between.

As in "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255): a whole document is cut into
prefix, middle and suffix at two places chosen evenly among its characters, and becomes

    PSM:  PRE prefix SUF suffix MID middle
    SPM:  PRE SUF suffix MID prefix middle    (the paper's second variant, whose sentinels mean the same as in PSM)

with the end-of-middle token after it, where the tokenizer has one. The three pieces are tokenized each for itself, as
they are when the model is asked to fill in; suffix and middle as continuations, not as beginnings of a text (but for
the middle in SPM when the prefix is empty, which is one). Nothing is cut off. What happens to a document depends on the
hash of its text and the variant alone: not on its place, the machine or the number of workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from data_tools.encoders import Encoded, Encoder
from llamapro.data.arrays import BoolArray, IntArray
from llamapro.data.permutation import mix, permutation_key
from llamapro.errors import DataError

# Prefix, suffix, middle and, where a family has it, end of the middle.
KNOWN_SENTINELS: tuple[tuple[str, ...], ...] = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
MARKS = ("☺", "\u2063", "\n")
_PROBES = ("a", " a", "  ", "1", ".", "é", "日", "🙂", "_x")
_FRACTION_BITS = 53


class FimOptions(BaseModel):
    """What a build does.

    Attributes:
        rate, spm_rate, tokens, variant: see `FimRequest`.
        prefix_id, suffix_id, middle_id, end_id: of the tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float
    spm_rate: float
    variant: int
    tokens: tuple[str, ...]
    prefix_id: int
    suffix_id: int
    middle_id: int
    end_id: int | None

    def stated(self) -> dict[str, str]:
        """As flags of the command line."""
        return {
            "fim_rate": f"{self.rate:g}",
            "fim_spm_rate": f"{self.spm_rate:g}",
            "fim_variant": str(self.variant),
            "fim_tokens": ",".join(self.tokens),
        }


@dataclass(frozen=True)
class FimRequest:
    """What a user asks for.

    Attributes:
        rate: share of the documents to rearrange; spm_rate: share of these that become SPM.
        tokens: texts of PRE, SUF, MID and perhaps the end of the middle; empty: those the tokenizer is known by.
        variant: another number gives other places, e.g. for another epoch.
    """

    rate: float = 0.0
    spm_rate: float = 0.5
    tokens: tuple[str, ...] = ()
    variant: int = 0

    def problems(self) -> list[str]:
        """What is wrong with it, one sentence each."""
        shares = {"--fim-rate": self.rate, "--fim-spm-rate": self.spm_rate}
        found = [
            f"{flag} {value}: give a share from 0 to 1" for flag, value in shares.items() if not 0.0 <= value <= 1.0
        ]
        if self.tokens and (len(self.tokens) not in (3, 4) or len(set(self.tokens)) != len(self.tokens)):
            given = ",".join(self.tokens)
            found.append(f"--fim-tokens {given}: give three or four different tokens, PRE,SUF,MID[,EOT]")
        return found


def fim_options(request: FimRequest, vocabulary: Mapping[str, int], tokenizer: str) -> FimOptions | None:
    """What a build does, None where nothing is asked for.

    Args:
        vocabulary: ids by text; tokenizer: where it is from, for messages.

    Raises:
        DataError: the tokenizer has no such tokens.
    """
    if request.rate == 0.0:
        return None
    found = _sentinels(request.tokens, vocabulary, tokenizer)
    ids = [vocabulary[text] for text in found]
    return FimOptions(
        rate=request.rate,
        spm_rate=request.spm_rate,
        variant=request.variant,
        tokens=found,
        prefix_id=ids[0],
        suffix_id=ids[1],
        middle_id=ids[2],
        end_id=ids[3] if len(ids) == 4 else None,
    )


def _sentinels(wanted: tuple[str, ...], vocabulary: Mapping[str, int], tokenizer: str) -> tuple[str, ...]:
    if wanted:
        if missing := [text for text in wanted if text not in vocabulary]:
            raise DataError(f"--fim-tokens: {tokenizer} has no token {', '.join(map(repr, missing))}")
        return wanted
    for known in KNOWN_SENTINELS:
        if all(text in vocabulary for text in known):
            return known
    examples = ", ".join(" ".join(known) for known in KNOWN_SENTINELS[:3])
    raise DataError(
        f"--fim-rate: {tokenizer} has no tokens for filling in (such as {examples}); name its own as --fim-tokens "
        "PRE,SUF,MID[,EOT], or build without --fim-rate"
    )


@dataclass(frozen=True)
class Choices:
    """What happens to documents.

    Attributes:
        rearranged, spm: (documents,) whether at all, and whether in the order SPM.
        cuts: (documents, 2) first character of the middle and of the suffix.
    """

    rearranged: BoolArray
    spm: BoolArray
    cuts: IntArray


def choices(options: FimOptions, hashes: NDArray[np.uint64], characters: IntArray) -> Choices:
    """What happens to documents with these hashes and numbers of characters."""
    places = np.stack([_draw(options, name, hashes) for name in ("first cut", "second cut")], axis=1)
    cuts = np.sort((places % (characters.astype(np.uint64) + np.uint64(1))[:, None]).astype(np.int64), axis=1)
    return Choices(
        rearranged=_share(_draw(options, "rearranged", hashes)) < options.rate,
        spm=_share(_draw(options, "spm", hashes)) < options.spm_rate,
        cuts=cuts,
    )


def _draw(options: FimOptions, purpose: str, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mix(hashes ^ np.uint64(permutation_key("fim", options.variant, purpose)))


def _share(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Even in [0, 1)."""
    return (values >> np.uint64(64 - _FRACTION_BITS)).astype(np.float64) / float(1 << _FRACTION_BITS)


class FimEncoder:
    """Encodes documents, a share of them rearranged.

    Args:
        encoder: encodes the pieces.

    Raises:
        DataError: the tokenizer can't encode a text as the continuation of another.
    """

    def __init__(self, options: FimOptions, encoder: Encoder) -> None:
        self._options = options
        self._encoder = encoder
        self._mark = continuation_mark(encoder)
        self._mark_ids = encoder.encode([self._mark])[0]

    def encode(self, texts: Sequence[str], hashes: NDArray[np.uint64], allowed: BoolArray) -> Encoded:
        """Encode texts; only those that are `allowed` are rearranged."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        chosen = choices(self._options, hashes, lengths)
        rearranged = (chosen.rearranged & allowed).tolist()
        pieces: list[str] = []
        for text, (first, second), spm, whether in self._each(texts, chosen, rearranged):
            middle = text[first:second] if spm and not first else self._mark + text[first:second]
            pieces += [text[:first], middle, self._mark + text[second:]] if whether else [text]
        ids, offsets = self._encoder.encode(pieces)
        found = iter(ids[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        documents = [
            self._arranged(next(found), next(found), next(found), first, spm) if whether else next(found)
            for _, (first, _), spm, whether in self._each(texts, chosen, rearranged)
        ]
        sizes = np.array([part.size for part in documents], dtype=np.int64)
        return np.concatenate([*documents, ids[:0]]), np.concatenate([[0], np.cumsum(sizes)])

    @staticmethod
    def _each(
        texts: Sequence[str], chosen: Choices, rearranged: list[bool]
    ) -> Iterator[tuple[str, tuple[int, int], bool, bool]]:
        return zip(texts, chosen.cuts.tolist(), chosen.spm.tolist(), rearranged, strict=True)

    def _arranged(
        self, prefix: NDArray[np.uint32], middle: NDArray[np.uint32], suffix: NDArray[np.uint32], first: int, spm: bool
    ) -> NDArray[np.uint32]:
        options = self._options
        suffix = self._without_mark(suffix)
        middle = middle if spm and not first else self._without_mark(middle)
        if not prefix.size + middle.size + suffix.size:
            return prefix  # a text without tokens stays one
        pre, suf, mid = ([number] for number in (options.prefix_id, options.suffix_id, options.middle_id))
        end = [] if options.end_id is None else [options.end_id]
        order = [pre, suf, suffix, mid, prefix, middle, end] if spm else [pre, prefix, suf, suffix, mid, middle, end]
        return np.concatenate([np.asarray(part, dtype=np.uint32) for part in order])

    def _without_mark(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        size = self._mark_ids.size
        if not np.array_equal(ids[:size], self._mark_ids):
            raise DataError(_joins(self._mark))
        return ids[size:]


def continuation_mark(encoder: Encoder) -> str:
    """A text that keeps what follows it from being encoded as the beginning of a text; empty where that is no matter.

    Tokenizers of the sentencepiece family put a space before every text, which must not come into the middle of one.

    Raises:
        DataError: none of the known marks stays apart from what follows.
    """
    if any(_ends_the_same(encoder, mark) for mark in MARKS):
        return ""
    for mark in MARKS:
        if _stays_apart(encoder, mark):
            return mark
    raise DataError(_joins(" or ".join(map(repr, MARKS))))


def _ends_the_same(encoder: Encoder, mark: str) -> bool:
    """Whether a text after the mark has the ids that it has alone."""
    alone, after = _ids(encoder, "a"), _ids(encoder, mark + "a")
    return after == _ids(encoder, mark) + alone


def _stays_apart(encoder: Encoder, mark: str) -> bool:
    ids = _ids(encoder, mark)
    return all(_ids(encoder, mark + probe)[: len(ids)] == ids for probe in _PROBES)


def _ids(encoder: Encoder, text: str) -> list[int]:
    found: list[int] = encoder.encode([text])[0].tolist()
    return found


def _joins(mark: str) -> str:
    return f"--fim-rate: this tokenizer joins {mark} with what follows, so pieces can't be told apart; build without it"
