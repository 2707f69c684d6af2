"""A document shown with what is learned of it: in green on a terminal, elsewhere in ⟦double brackets⟧."""

import os
import sys
from collections.abc import Sequence

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"

Part = tuple[str, bool]
"""A piece of text, and whether it is learned."""


def marked_text(parts: Sequence[Part], characters: int) -> str:
    """The beginning of a document, what is learned of it marked.

    Args:
        characters: of text at most; what follows is an ellipsis.
    """
    before, after = (_GREEN, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("⟦", "⟧")
    shown, left = "", characters
    for text, learned in parts:
        piece = text[:left] + ("…" if len(text) > left else "")
        shown += f"{before}{piece}{after}" if learned else piece
        left -= len(text)
        if left < 0:
            break
    return shown
