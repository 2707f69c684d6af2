"""Rendered conversations into ids, with what is scored: by the tokenizers library, as transformers does it.

Special tokens that a template writes become their ids; that messages hold none was seen to before. A token is scored
when any character of it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.chat.template import Span
from data_tools.encoders import tokenizers_tokenizer
from llamapro.data.arrays import BoolArray, IntArray

NOTHING_SCORED = "no token of an answer within --max-tokens"


@dataclass(frozen=True)
class EncodedChat:
    """One conversation.

    Attributes:
        ids: (tokens,); scored: (tokens,) whether each is learned.
        scored_bytes: UTF-8 bytes of the text that the scored tokens stand for.
        lost: tokens that were cut off.
    """

    ids: NDArray[np.uint32]
    scored: BoolArray
    scored_bytes: int
    lost: int


class ChatEncoder:
    """Encodes rendered conversations.

    Args:
        path: tokenizer.json; max_tokens: longer conversations are cut; None: none is.
    """

    def __init__(self, path: Path, max_tokens: int | None) -> None:
        self._tokenizer = tokenizers_tokenizer(path)
        self._tokenizer.encode_special_tokens = False
        self._max_tokens = max_tokens

    def encode(self, texts: Sequence[str], scored: Sequence[tuple[Span, ...] | None]) -> list[EncodedChat]:
        """Encode texts; `scored` are the characters to learn of each, None: all."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._chat(text, spans, one.ids, one.offsets) for text, spans, one in zip(texts, scored, found, strict=True)
        ]

    def _chat(
        self, text: str, spans: tuple[Span, ...] | None, ids: Sequence[int], places: Sequence[Span]
    ) -> EncodedChat:
        kept = len(ids) if self._max_tokens is None else min(len(ids), self._max_tokens)
        characters = np.array(places[:kept], dtype=np.int64).reshape(-1, 2)
        spans = ((0, len(text)),) if spans is None else spans
        end = len(text) if kept == len(ids) else int(characters[-1, 1])
        return EncodedChat(
            ids=np.array(ids[:kept], dtype=np.uint32),
            scored=scored_tokens(characters, spans),
            scored_bytes=sum(len(text[start : min(stop, end)].encode()) for start, stop in spans),
            lost=len(ids) - kept,
        )


def scored_tokens(characters: IntArray, spans: Sequence[Span]) -> BoolArray:
    """Which tokens have a character in one of the spans.

    Args:
        characters: (tokens, 2) first character of each token and the one after its last; a token that stands for none
            belongs to the character it stands before.
    """
    starts, stops = characters[:, 0], np.maximum(characters[:, 1], characters[:, 0] + 1)
    scored = np.zeros(len(characters), dtype=np.bool_)
    for first, stop in spans:
        scored |= (starts < stop) & (stops > first)
    return scored
