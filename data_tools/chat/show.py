"""A document shown with what is learned of it: in green on a terminal, elsewhere in ⟦double brackets⟧."""

import os
import sys
from collections.abc import Sequence

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"

Part = tuple[str, bool]
"""A piece of text, and whether it is learned."""


def marked_text(parts: Sequence[Part], characters: int) -> str:
    """A document, what is learned of it marked, so short that a question and its answer are seen.

    Args:
        characters: of text at most, of each part a third of it: its beginning and its end. What follows is an ellipsis.
    """
    before, after = (_GREEN, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("⟦", "⟧")
    shown, left = "", characters
    for text, learned in parts:
        if left <= 0:
            return f"{shown}…"
        piece = _shortened(text, min(left, characters // 3))
        shown += f"{before}{piece}{after}" if learned else piece
        left -= len(piece)
    return shown


def _shortened(text: str, characters: int) -> str:
    half = max(1, characters // 2)
    return text if len(text) <= characters else f"{text[:half]} … {text[-half:]}"
