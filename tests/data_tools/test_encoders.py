"""Tokenizer libraries behind one call; one that does not give the reference's ids is passed over, and that is said.

What ids they give is in test_parity.
"""

import subprocess
import sys

import numpy as np
import orjson
import pytest
from transformers import LlamaTokenizer

from data_tools import encoders, parity
from data_tools.encoders import open_encoder
from data_tools.parity import choose_library
from tests.support.data import save_sentencepiece, save_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("model")) / "tokenizer.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_sentencepiece(tmp_path_factory.mktemp("sp") / "m") / "tokenizer.model"


@pytest.fixture(scope="module")
def both(path):
    return open_encoder(path, "fastokens"), open_encoder(path, "tokenizers")


def ids_of(encoder, text):
    return encoder.encode([text])[0].tolist()


def test_sentencepiece_keeps_special_strings_as_text(model):
    ids = ids_of(open_encoder(model, "sentencepiece"), "a</s>b<s>")
    assert not {0, 1, 2} & set(ids)


def test_batches_are_flat_with_offsets(both):
    for encoder in both:
        ids, offsets = encoder.encode(["ab", "", "heart"])
        assert offsets.tolist()[0] == 0 and offsets[1] == offsets[2] and offsets[-1] == ids.size
        assert ids.dtype == np.uint32
        assert ids[offsets[2] :].tolist() == ids_of(encoder, "heart")


def test_the_fastest_equal_library_is_chosen(path, model, capsys):
    assert choose_library(path, ["some text"], SPECIAL) == "fastokens"
    assert "same ids as tokenizers" in capsys.readouterr().err
    assert choose_library(model, ["some text"], []) == "sentencepiece"


def test_a_library_with_other_ids_is_passed_over_and_reported(path, monkeypatch, capsys):
    class Wrong(encoders.TokenizersEncoder):
        library = "fastokens"

        def encode(self, texts):
            ids, offsets = super().encode(texts)
            wrong = ids.copy()
            wrong[offsets[:-1][["odd one" in text for text in texts]]] = 7
            return wrong, offsets

    monkeypatch.setitem(encoders.ENCODERS, "tokenizer.json", (Wrong, encoders.TokenizersEncoder))
    assert choose_library(path, ["fine"], SPECIAL) == "fastokens"
    assert choose_library(path, ["fine", "the odd one"], SPECIAL) == "tokenizers"
    assert "passed over: it gives other ids than tokenizers for 'the odd one'" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "message"), [(ImportError, "not installed"), (ValueError, "can't read this")])
def test_a_missing_or_unable_library_is_passed_over_and_reported(path, monkeypatch, capsys, error, message):
    class Missing:
        library = "fastokens"

        def __init__(self, path):
            raise error("no")

    monkeypatch.setitem(parity.ENCODERS, "tokenizer.json", (Missing, encoders.TokenizersEncoder))
    assert choose_library(path, [], SPECIAL) == "tokenizers"
    assert message in capsys.readouterr().err


def test_building_imports_neither_torch_nor_transformers():
    code = "import sys, data_tools.build, data_tools.inspect; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture(scope="module", params=["first", "never"])
def metaspace(request, model, tmp_path_factory):
    """The sentencepiece model as transformers saves it: with a pre-tokenizer that fastokens does not know."""
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    stated = orjson.loads(LlamaTokenizer.from_pretrained(model.parent).backend_tokenizer.to_str())
    assert stated["pre_tokenizer"]["type"] == "Metaspace" and not stated["pre_tokenizer"]["split"]
    stated["pre_tokenizer"]["prepend_scheme"] = request.param
    path.write_bytes(orjson.dumps(stated))
    return path


def test_strings_that_no_merge_makes_a_token_stay_text(metaspace):
    """Of itself this version of fastokens gives the ids of <s> and <0x0A>, which no merge leads to, for such text."""
    encoder = open_encoder(metaspace, "fastokens")
    assert encoder._encode(["a<s>"])[0][-1] == 1
    ids, offsets = encoder.encode(["plain", "a<s>", "", "b</s>c<0x0A>", "plain"])
    texts = [ids[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    assert texts[0] == texts[4] and texts[2] == [] and min(ids) > 2
    assert 1 not in texts[1] and len(texts[3]) > 8
    assert choose_library(metaspace, ["some text"], SPECIAL) == "fastokens"


def test_a_metaspace_that_splits_is_left_to_the_reference(metaspace, capsys):
    stated = orjson.loads(metaspace.read_bytes())
    stated["pre_tokenizer"]["split"] = True
    metaspace.with_name("split").mkdir(exist_ok=True)
    path = metaspace.with_name("split") / "tokenizer.json"
    path.write_bytes(orjson.dumps(stated))
    assert choose_library(path, ["some text"], SPECIAL) == "tokenizers"
    assert "fastokens is passed over: it can't read this tokenizer" in capsys.readouterr().err
