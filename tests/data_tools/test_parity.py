"""All libraries give the same ids for the same tokenizer: on every code point, and on strings made to break it.

Tokenizers of both families and of all the ways in which models state them; `make test-slow` has every code point for
all of them, and 60,000 strings.
"""

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoders import open_encoder
from data_tools.parity import awkward_texts, first_difference
from tests.support.data import WORDS, random_texts, save_sentencepiece
from tests.support.tokenizers import KINDS, save_kind

SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "<0x0A>", "<pad>")
FEW = 3_000
MANY = 60_000
POINTS = [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
# Of each family the one that most models have; the others' code points are for the slow tests.
SWEPT = ("llama-2", "llama-3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def opened(folder):
    """By kind: fastokens and its reference, and the ids of the special tokens."""
    found = {}
    for number, kind in enumerate(KINDS):
        (folder / str(number)).mkdir()
        path = save_kind(kind, folder / str(number))
        reference = open_encoder(path, "tokenizers")
        special = [i for i, token in reference._tokenizer.get_added_tokens_decoder().items() if token.special]
        found[kind] = (open_encoder(path, "fastokens"), reference, special)
    return found


@pytest.fixture(params=KINDS)
def both(opened, request):
    return opened[request.param]


def fuzz_strings(count, seed=11):
    """Strings of all sorts, the same every time."""
    generator = np.random.default_rng(seed)
    alphabets = [
        [chr(point) for point in range(1, 128)],
        list(" \t\n\r\u00a0\u2003\u3000\u200b\ufeff\u2581_"),
        list("aAbB019 .,'’-_/\\{}()<>|\n"),
        list("e\u0301\u0327\u0308n\u0303\u1100\u1161\u11a8a\u200d\ufe0f🏳🌈👩🇩🇪\U0001f3fd"),
        list("日本語テキスト中文한국어ไทยالعربيةעבריתहिन्दी"),
        [word + gap for word in (*WORDS, *SPECIAL, "don't", "I'LL", "1234567") for gap in ("", " ")],
        POINTS,
    ]
    strings = []
    for _ in range(count):
        mixed = [alphabets[number] for number in generator.integers(len(alphabets), size=generator.integers(1, 4))]
        size = int(generator.geometric(0.04))
        chosen = [mixed[number] for number in generator.integers(len(mixed), size=size)]
        strings.append("".join(letters[generator.integers(len(letters))] for letters in chosen))
    return strings


def code_points():
    """Every code point after a letter and before one, and after its neighbour and before the other."""
    chunks = [POINTS[start : start + 512] for start in range(0, len(POINTS), 512)]
    return [separator.join(chunk) for chunk in chunks for separator in ("a", "")]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SWEPT else pytest.mark.slow) for kind in KINDS]
)
def test_every_code_point_has_the_ids_of_the_reference(opened, kind):
    assert first_difference(*opened[kind][:2], code_points()) is None


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_strings_of_all_sorts_have_the_ids_of_the_reference(both, count):
    strings = fuzz_strings(count)
    assert len(set(strings)) > 0.9 * count
    assert first_difference(both[0], both[1], strings) is None


def test_texts_awkward_strings_and_the_edges_of_texts_have_the_ids_of_the_reference(both):
    edges = [before + text for before in ("", " ", "  ", "\u2581", "\u2581 ") for text in ("", "a", "a b", " \u2581")]
    assert first_difference(*both[:2], [*edges, *awkward_texts(SPECIAL), *random_texts(300, seed=3)]) is None


@settings(max_examples=100)
@given(texts=st.lists(st.text(max_size=60), max_size=6))
@pytest.mark.parametrize("kind", SWEPT)
def test_any_batch_of_texts_has_the_ids_of_the_reference(opened, kind, texts):
    assert first_difference(*opened[kind][:2], texts) is None


def test_no_special_token_comes_out_of_any_text(both):
    strings = [*fuzz_strings(FEW, seed=12), *(f"a{text}b {text}" for text in SPECIAL)]
    assert len(both[2]) >= 3
    for encoder in both[:2]:
        assert not np.isin(encoder.encode(strings)[0], both[2]).any()


def test_the_comparison_sees_one_other_id_among_many(opened):
    _, reference, _ = opened["llama-3"]

    class Wrong:
        def encode(self, texts):
            ids, offsets = reference.encode(texts)
            wrong = ids.copy()
            wrong[offsets[:-1][[text == "the odd one" for text in texts]]] += 1
            return wrong, offsets

    assert first_difference(Wrong(), reference, [*fuzz_strings(600), "the odd one", "x"]) == "the odd one"


def test_a_converted_tokenizer_has_the_ids_of_its_sentencepiece_model(tmp_path):
    """Not of texts of white space alone or around: there the conversion differs by a rule."""
    model = save_sentencepiece(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    reference = open_encoder(model / "tokenizer.model", "sentencepiece")
    strings = [f"a{text}b" for text in fuzz_strings(FEW, seed=13)]
    for library in ("fastokens", "tokenizers"):
        encoder = open_encoder(tmp_path / "tokenizer.json", library)
        assert first_difference(encoder, reference, [*code_points(), *strings]) is None
