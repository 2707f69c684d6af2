"""What makes two tokenizers the same for a dataset: the ids of their added tokens and of a fixed probe text.

Files are not compared: the same tokenizer is saved differently by every library and version.
"""

import hashlib
from collections.abc import Callable, Mapping

import orjson

PROBE_TEXT = "\n".join(
    (
        "The quick brown fox jumps over the lazy dog; THE QUICK BROWN FOX, 'tis said, didn't.",
        "Mutations in BRCA1 and TP53 were found in 12,345 of 67,890 patients (18.2%, p < 0.001) since 1999-12-31.",
        'def add(left: int, right: int) -> int:\n    """Sum."""\n\treturn left + right  # != left - right\n',
        "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }   SELECT * FROM t WHERE id = 42 AND name LIKE '%x%';",
        "Größe, naïve façade, œuvre, año, žluťoučký kůň, Ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย",
        "日本語のテキスト、中文文本。한국어 텍스트 ½ ¾ ∀x∈ℝ: ∫₀¹ f(x)dx ≤ √π — “quotes” …",
        "👩‍🔬🧬 e\u0301 \u00a0\u2009 end",
        "\\begin{theorem} Let $n > 2$ be odd. \\end{theorem}   https://example.org/a?b=c&d=%20  user@example.org",
        "    four spaces, two tabs\t\t, trailing spaces   ",
        "supercalifragilisticexpialidocious antidisestablishmentarianism AaAaBbBb 0000001 3.14159265358979",
    )
)


def tokenizer_identity(added: Mapping[str, int], encode: Callable[[str], list[int]]) -> str:
    """The identity of a tokenizer, 64 hexadecimal digits.

    Args:
        added: id of every added token (special or not) by its text.
        encode: text to ids, without tokens added before or after.
    """
    facts = {"added": sorted(added.items(), key=lambda item: (item[1], item[0])), "probe": encode(PROBE_TEXT)}
    return hashlib.sha256(orjson.dumps(facts)).hexdigest()
