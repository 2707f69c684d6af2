"""What a model's folder says about its tokenizer, compared with what transformers makes of the same folder."""

import shutil

import orjson
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from data_tools.tokenizer import locate_tokenizer, read_tokenizer, tokenizer_files
from llamapro.errors import DataError
from tests.support.data import save_sentencepiece, save_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tokenizer(tmp_path / "model")


def change(folder, name="tokenizer_config.json", **values):
    path = folder / name
    found = orjson.loads(path.read_bytes()) if path.exists() else {}
    found.update(values)
    path.write_bytes(orjson.dumps({key: value for key, value in found.items() if value is not None}))


def add_bos_by_post_processor(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_ids_and_size_are_those_of_transformers(folder):
    facts, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (facts.bos_id, facts.eos_id, facts.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert facts.pad_id == facts.eos_id and facts.token_dtype == "<u2" and facts.eos_inserted


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("processed", [True, False])
def test_bos_is_inserted_exactly_where_transformers_does_it(folder, stated, processed):
    if processed:
        add_bos_by_post_processor(folder)
    change(folder, add_bos_token=stated)
    assert read_tokenizer(folder).bos_inserted == (AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 0)


def test_added_tokens_count_for_the_vocabulary(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder, pad_token={"content": "<pad>"})
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    facts = read_tokenizer(folder)
    assert (facts.vocab_size, facts.pad_id) == (size, size - 1)


def test_eos_may_be_an_id_in_the_model_configuration(folder):
    change(folder, eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    change(folder, "config.json", eos_token_id=[3, 1])
    assert read_tokenizer(folder).eos_id == 3


def test_without_eos_nothing_can_be_built(folder):
    change(folder, eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no eos_token is stated"):
        read_tokenizer(folder)


def test_an_eos_that_the_vocabulary_lacks_is_refused(folder):
    change(folder, eos_token="<end>")
    with pytest.raises(DataError, match="no token '<end>', which its settings call eos_token"):
        read_tokenizer(folder)


@pytest.mark.parametrize("stated", [None, True, False])
def test_a_sentencepiece_folder_agrees_with_transformers(tmp_path, stated):
    folder = save_sentencepiece(tmp_path / "sp")
    change(folder, add_bos_token=stated)
    facts = read_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(shutil.copytree(folder, tmp_path / "copy"))
    assert (facts.bos_id, facts.eos_id, facts.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert facts.bos_inserted == (theirs("a").input_ids[0] == theirs.bos_token_id)
    assert [path.name for path in tokenizer_files(folder)] == ["tokenizer.model", "tokenizer_config.json"]


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_tokenizer_is_refused_by_name(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json can't be read as a tokenizer"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "should hold one JSON object"), ("{", "not valid JSON"), ("\udcff", "not valid JSON")],
)
def test_a_broken_settings_file_is_refused_by_name(folder, name, content, message):
    (folder / name).write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=f"{name} .*{message}"):
        read_tokenizer(folder)


@pytest.mark.parametrize("content", ["[]", "x"])
def test_a_broken_list_of_added_tokens_is_refused_by_name(tmp_path, content):
    folder = save_sentencepiece(tmp_path / "sp")
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(DataError, match="added_tokens.json"):
        read_tokenizer(folder)


def test_places_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither tokenizer.json nor tokenizer.model"):
        read_tokenizer(tmp_path)
    for model in (str(tmp_path / "none"), "./none", "just-a-word", "a/b/c"):
        with pytest.raises(DataError, match="no such folder"):
            locate_tokenizer(model)


def test_a_tokenizer_file_stands_for_its_folder(folder):
    assert locate_tokenizer(str(folder / "tokenizer.json")) == locate_tokenizer(str(folder)) == folder.resolve()
