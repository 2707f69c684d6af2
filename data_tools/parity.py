"""Choosing the tokenizer library: the fastest that gives exactly the reference's ids, tested before every build."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.encoders import ENCODERS, Encoder, library_version, open_encoder
from llamapro import console
from llamapro.data.tokenizer_identity import PROBE_TEXT

CODE_POINT_STEP = 61
_TEXTS_PER_CALL = 256
_AWKWARD = (
    "", " ", "  ", "\n", "\t\n \r\n", "a", " a", "a ", "\u2581", "\u2581\u2581a", "\ufeffa", "\u200b", "\u00a0x\u2003y",
    "\x01\x7f", "a" * 3000, " " * 500, "ab" * 1000, "\n" * 300, "0123456789" * 50,
    "e\u0301\u0327\u0308", "\u1100\u1161\u11a8",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪🇫",
    "don't DON'T we'll I'M 'S", "\U0010fffd\ue000\ufffd", "İıſKÅ ﬁ ㌔ ²³", "x\r\ny\rz", "<|x|>< s ></ s>",
)  # fmt: skip


def choose_library(path: Path, samples: Sequence[str], special: Sequence[str]) -> str:
    """The library to encode with; what is passed over is reported with the reason.

    Args:
        path: tokenizer.json or tokenizer.model.
        samples: documents of the input.
        special: texts of the special tokens, which must stay text.
    """
    libraries = [kind.library for kind in ENCODERS[path.name]]
    reference = open_encoder(path, libraries[-1])
    for library in libraries[:-1]:
        objection = _objection(path, library, reference, [*awkward_texts(special), *samples])
        if objection is None:
            console.info(
                f"tokenizer library: {library_version(library)}, same ids as {library_version(libraries[-1])} on "
                f"{len(samples):,} sampled documents and the awkward strings"
            )
            return library
        console.warning(f"tokenizer library {library} is passed over: {objection}")
    console.info(f"tokenizer library: {library_version(libraries[-1])}")
    return libraries[-1]


def awkward_texts(special: Sequence[str]) -> list[str]:
    """Strings that tokenizer libraries are known to differ on, and a sample of all code points."""
    points = [chr(point) for point in range(1, 0x110000, CODE_POINT_STEP) if not 0xD800 <= point < 0xE000]
    spread = [" ".join(points[start : start + 64]) for start in range(0, len(points), 64)]
    return [*_AWKWARD, PROBE_TEXT, *spread, *(f"a{text}b {text}" for text in special)]


def first_difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """The first text that two encoders give different ids for."""
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        part = texts[start : start + _TEXTS_PER_CALL]
        (ids, offsets), (expected, bounds) = encoder.encode(part), reference.encode(part)
        if np.array_equal(ids, expected) and np.array_equal(offsets, bounds):
            continue
        for text, a, b, c, d in zip(part, offsets[:-1], offsets[1:], bounds[:-1], bounds[1:], strict=True):
            if not np.array_equal(ids[a:b], expected[c:d]):
                return text
    return None


def _objection(path: Path, library: str, reference: Encoder, texts: Sequence[str]) -> str | None:
    try:
        encoder = open_encoder(path, library)
    except ImportError:
        return "it is not installed (pip install 'llamapro[fast]')"
    except ValueError as error:
        return f"it can't read this tokenizer: {error}"
    different = first_difference(encoder, reference, texts)
    return None if different is None else f"it gives other ids than {reference.library} for {different[:80]!r}"
