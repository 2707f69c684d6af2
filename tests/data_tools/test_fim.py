"""Fill-in-the-middle: every rearranged document is its text again when put together; the rest stays as it was."""

import numpy as np
import orjson
import pytest
import sentencepiece
import transformers

from data_tools.build import build_dataset
from data_tools.encoders import open_encoder
from data_tools.fim import KNOWN_SENTINELS, FimRequest, choices, continuation_mark, fim_options
from data_tools.request import BuildRequest
from llamapro.data.dataset import Dataset
from llamapro.data.splits import document_hash, is_heldout
from llamapro.data.verify import verify_dataset
from llamapro.errors import DataError, UserError
from tests.support.data import build, random_texts, save_sentencepiece, save_tokenizer, shard_bytes, write_jsonl

SENTINELS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
TEXTS = [*random_texts(300, seed=5), "x", "ab", "  indented\n\tcode", "<fim_prefix> as text <fim_middle>"]


def save_byte_level(folder):
    save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SENTINELS)})
    tokenizer.save_pretrained(folder)
    return folder


def save_llama_like(folder):
    """A tokenizer.model that puts a space before every text, with the sentinels beside it."""
    save_sentencepiece(folder)
    (folder / "added_tokens.json").write_bytes(orjson.dumps({text: 320 + i for i, text in enumerate(SENTINELS)}))
    return folder


@pytest.fixture(scope="module", params=[save_byte_level, save_llama_like], ids=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model") / "m")


def request_of(corpus, tokenizer, output, fim, **changes):
    values = {"inputs": (str(corpus),), "tokenizer": str(tokenizer), "output": output, "text_field": "text"}
    values |= {"split": "file", "heldout": 0.2, "license": "", "max_reject_fraction": 0.0, "workers": 1}
    return BuildRequest(**(values | changes), fim=fim)


def built(corpus, tokenizer, output, fim, **changes):
    build_dataset(request_of(corpus, tokenizer, output, fim, **changes))
    return Dataset.open(output)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", TEXTS)


@pytest.fixture(scope="module")
def dataset(tokenizer, corpus, tmp_path_factory):
    return built(corpus, tokenizer, tmp_path_factory.mktemp("built") / "d", FimRequest(rate=0.6, spm_rate=0.3))


def documents_of(dataset, split):
    """Row and ids of every document."""
    for shard in dataset.split(split).shards:
        for index, row in enumerate(shard.column("source_rows").tolist()):
            yield row, shard.document(index).tolist()


def plain_decoder(folder):
    """Ids to text by the reference library, without any of this project's code; each piece by what it continues."""
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return lambda ids, first: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    letter = model.encode("x")
    return lambda ids, first: model.decode(ids) if first else model.decode(letter + ids).removeprefix("x")


def put_together(ids, sentinels, decode):
    """The text of a document, and its order, by the definition in the paper."""
    pre, suf, mid = sentinels
    assert [ids.count(number) for number in sentinels] == [1, 1, 1] and ids[0] == pre
    a, b = ids.index(suf), ids.index(mid)
    assert a < b
    if a == 1:  # SPM: PRE SUF suffix MID prefix middle; the first two join without a trace
        return decode(ids[b + 1 :], True) + decode(ids[2:b], False), "SPM"
    return decode(ids[1:a], True) + decode(ids[b + 1 :], False) + decode(ids[a + 1 : b], False), "PSM"


def sentinel_ids(dataset):
    options = dataset.manifest.options
    assert options["fim_tokens"] == ",".join(SENTINELS)
    added = [320, 321, 322] if dataset.manifest.vocab_size == 323 else None
    assert added, "the sentinels were added after the 320 tokens of the tiny tokenizers"
    return added


def test_every_rearranged_document_is_its_text_when_put_together(dataset, tokenizer):
    sentinels, decode = sentinel_ids(dataset), plain_decoder(tokenizer)
    kinds = {"PSM": 0, "SPM": 0, "plain": 0}
    seen = 0
    for row, whole in documents_of(dataset, "train"):
        ids, seen = whole[:-1], seen + 1
        if set(sentinels) & set(ids):
            text, kind = put_together(ids, sentinels, decode)
        else:
            text, kind = decode(ids, True), "plain"
        assert text == TEXTS[row]
        kinds[kind] += 1
    assert seen > 200
    assert kinds["plain"] / seen == pytest.approx(0.4, abs=0.1)
    assert kinds["SPM"] / (seen - kinds["plain"]) == pytest.approx(0.3, abs=0.1)
    assert verify_dataset(dataset.folder) == []


def test_held_out_documents_stay_plain(dataset, tokenizer):
    decode = plain_decoder(tokenizer)
    found = list(documents_of(dataset, "heldout"))
    assert len(found) > 30
    for row, ids in found:
        assert not set(sentinel_ids(dataset)) & set(ids) and decode(ids[:-1], True) == TEXTS[row]


def test_workers_order_and_neighbours_change_no_document(dataset, tokenizer, corpus, tmp_path):
    fim = FimRequest(rate=0.6, spm_rate=0.3)
    again = built(corpus, tokenizer, tmp_path / "again", fim, workers=2)
    assert shard_bytes(again.folder) == shard_bytes(dataset.folder)
    fewer = write_jsonl(tmp_path / "b.jsonl", TEXTS[:150:-1])
    expected = {TEXTS[row]: ids for row, ids in documents_of(dataset, "train")}
    for row, ids in documents_of(built(fewer, tokenizer, tmp_path / "fewer", fim), "train"):
        assert ids == expected[TEXTS[:150:-1][row]]


def test_another_rate_or_variant_is_another_dataset_and_none_is_as_before(dataset, tokenizer, corpus, tmp_path):
    prints = {dataset.fingerprint}
    for number, fim in enumerate([FimRequest(rate=0.6), FimRequest(rate=0.6, spm_rate=0.3, variant=1), FimRequest()]):
        prints.add(built(corpus, tokenizer, tmp_path / str(number), fim).fingerprint)
    assert len(prints) == 4
    plain = build([corpus], tokenizer, tmp_path / "plain", heldout=0.2)
    assert plain.fingerprint in prints and "fim_rate" not in plain.manifest.options
    with pytest.raises(UserError, match="already holds a finished dataset"):
        built(corpus, tokenizer, tmp_path / "plain", FimRequest(rate=0.1))


def test_cuts_are_even_over_the_characters_and_shares_exact():
    options = fim_options(FimRequest(rate=0.5, spm_rate=0.25), dict.fromkeys(SENTINELS, 1), "t")
    hashes = np.array([document_hash(str(i).encode()) for i in range(40_000)], dtype=np.uint64)
    found = choices(options, hashes, np.full(hashes.size, 9))
    assert found.rearranged.mean() == pytest.approx(0.5, abs=0.01)
    assert found.spm[found.rearranged].mean() == pytest.approx(0.25, abs=0.01)
    assert found.rearranged[is_heldout(hashes, 0.5)].mean() == pytest.approx(0.5, abs=0.02)
    pairs, counts = np.unique(found.cuts[found.rearranged], axis=0, return_counts=True)
    assert len(pairs) == 55 and (pairs[:, 0] <= pairs[:, 1]).all()
    expected = np.where(pairs[:, 0] == pairs[:, 1], 1, 2) / 100  # two even draws, sorted
    assert counts / counts.sum() == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("known", KNOWN_SENTINELS, ids=lambda known: known[0])
def test_sentinels_are_known_by_their_names(known):
    vocabulary = {text: 10 + number for number, text in enumerate(known)} | {"a": 0}
    options = fim_options(FimRequest(rate=0.5), vocabulary, "t")
    assert (options.prefix_id, options.suffix_id, options.middle_id) == (10, 11, 12)
    assert options.tokens == known and options.end_id == (13 if len(known) == 4 else None)


def test_named_sentinels_with_an_end_are_used(tmp_path, corpus, tokenizer):
    words = FimRequest(rate=1.0, spm_rate=0.0, tokens=(*SENTINELS, "</s>"))
    if "</s>" not in (tokenizer / "tokenizer_config.json").read_text():
        pytest.skip("this tokenizer has another end")
    dataset = built(corpus, tokenizer, tmp_path / "d", words, heldout=0.0)
    eos = dataset.manifest.eos_id
    assert all(ids[-2:] == [eos, eos] and ids[0] == 320 for _, ids in documents_of(dataset, "train"))


@pytest.mark.parametrize(
    ("fim", "message"),
    [
        (FimRequest(rate=0.5), "has no tokens for filling in .such as <fim_prefix>"),
        (FimRequest(rate=0.5, tokens=("<P>", "a", "b")), "has no token '<P>'"),
    ],
)
def test_a_tokenizer_without_the_tokens_is_refused(tmp_path, corpus, fim, message):
    with pytest.raises(DataError, match=message):
        built(corpus, save_tokenizer(tmp_path / "m"), tmp_path / "d", fim)


@pytest.mark.parametrize(
    "values", [{"rate": 1.5}, {"rate": 0.5, "spm_rate": -1.0}, {"tokens": ("a", "b")}, {"tokens": ("a",) * 3}]
)
def test_values_out_of_range_are_refused(corpus, tokenizer, tmp_path, values):
    with pytest.raises(UserError, match=f"--fim-{'tokens' if 'tokens' in values else ''}"):
        request_of(corpus, tokenizer, tmp_path / "d", FimRequest(**values))


def test_only_tokenizers_that_put_a_space_before_a_text_need_a_mark(tmp_path):
    byte_level = open_encoder(save_byte_level(tmp_path / "a") / "tokenizer.json", "fastokens")
    llama_like = open_encoder(save_llama_like(tmp_path / "b") / "tokenizer.model", "sentencepiece")
    assert continuation_mark(byte_level) == "" and continuation_mark(llama_like) != ""


class Joining:
    """A tokenizer that makes one token of every text."""

    library = "joining"

    def encode(self, texts):
        ids = np.array([document_hash(text.encode()) & 0xFFFF for text in texts], dtype=np.uint32)
        return ids, np.arange(len(texts) + 1)


def test_a_tokenizer_that_joins_every_mark_is_refused():
    with pytest.raises(DataError, match="this tokenizer joins"):
        continuation_mark(Joining())
