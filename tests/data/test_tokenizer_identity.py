"""Two tokenizers have one identity exactly if they give text the same ids."""

from transformers import AutoTokenizer

from data_tools.tokenizer import read_tokenizer
from llamapro.data.tokenizer_identity import PROBE_TEXT, tokenizer_identity
from tests.support.data import save_sentencepiece, save_tokenizer
from tests.support.models import tiny_tokenizer


def test_it_depends_on_added_ids_and_on_the_ids_of_the_probe():
    def encode(text):
        return list(text.encode())

    identity = tokenizer_identity({"<s>": 1, "</s>": 2}, encode)
    assert tokenizer_identity({"</s>": 2, "<s>": 1}, encode) == identity
    assert tokenizer_identity({"<s>": 1, "</s>": 3}, encode) != identity
    assert tokenizer_identity({"<s>": 1, "</s>": 2}, lambda text: encode(text)[:-1]) != identity


def test_the_probe_holds_no_special_token_of_common_tokenizers():
    assert not any(text in PROBE_TEXT for text in ("<s>", "</s>", "<unk>", "<|", "|>", "[PAD]", "<pad>"))


def test_transformers_and_this_program_find_the_same_identity(tmp_path):
    folder = save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    expected = tokenizer_identity(added, lambda text: tokenizer.encode(text, add_special_tokens=False))
    assert read_tokenizer(folder).tokenizer_identity == expected


def test_saving_a_tokenizer_again_does_not_change_it_but_another_token_does(tmp_path):
    folder = save_tokenizer(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    larger = tiny_tokenizer()
    larger.add_special_tokens({"pad_token": "<pad>"})
    larger.save_pretrained(tmp_path / "larger")
    first, again, other = (read_tokenizer(tmp_path / name) for name in ("model", "again", "larger"))
    assert first.tokenizer_identity == again.tokenizer_identity != other.tokenizer_identity


def test_a_sentencepiece_model_has_one_too(tmp_path):
    small = read_tokenizer(save_sentencepiece(tmp_path / "a", vocab_size=320))
    large = read_tokenizer(save_sentencepiece(tmp_path / "b", vocab_size=330))
    assert small.tokenizer_identity != large.tokenizer_identity
