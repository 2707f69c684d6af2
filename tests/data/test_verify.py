"""Verification finds nothing in a whole dataset, and every kind of damage with its place."""

import shutil

import numpy as np
import pytest

from llamapro.data.dataset import Dataset
from llamapro.data.packing import ensure_pack
from llamapro.data.shard import Documents, ShardFacts, write_shard
from llamapro.data.verify import _contradictions, verify_dataset
from llamapro.errors import Corrupted
from tests.support.data import as_documents, build, flip_bit, random_texts, save_tokenizer, tokenization, write_jsonl


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    texts = write_jsonl(folder / "a.jsonl", random_texts(60, seed=2))
    return build([texts], save_tokenizer(folder / "model"), folder / "law", heldout=0.2)


@pytest.fixture
def dataset(built, tmp_path):
    shutil.copytree(built.folder, tmp_path / "law")
    return Dataset.open(tmp_path / "law")


def test_a_built_dataset_is_whole_and_pack_plans_do_not_disturb(dataset):
    ensure_pack(dataset, "train", 32, "bestfit", None)
    seen = []
    assert verify_dataset(dataset.folder, seen.append) == []
    assert sum(seen) == sum(dataset.split(name).tokens for name in ("train", "heldout"))


def test_a_flipped_token_bit_names_file_block_and_documents(dataset):
    path = dataset.split("train").shards[0].path
    flip_bit(path, 4096 + 20)
    problems = verify_dataset(dataset.folder)
    assert any(f"{path} differs from its recorded digest" in problem for problem in problems)
    assert any("block 0 of 'tokens'" in p and "documents 0 (input 0, row" in p for p in problems)


@pytest.mark.parametrize("section", ["offsets", "text_bytes", "hashes", "source_rows", "block_checks"])
def test_a_flipped_bit_in_any_section_is_found(dataset, section):
    shard = dataset.split("heldout").shards[0]
    flip_bit(shard.path, shard.container.header.sections[section].offset)
    problems = verify_dataset(dataset.folder)
    assert any(section in problem or "table of checksums" in problem for problem in problems)


def test_damage_between_the_sections_and_in_the_tokenizer_is_found(dataset):
    path = dataset.split("train").shards[0].path
    flip_bit(path, path.stat().st_size - 1)
    flip_bit(dataset.folder / "tokenizer" / "tokenizer.json", 5)
    problems = verify_dataset(dataset.folder)
    assert {p.split(" differs")[0] for p in problems} == {str(path), str(dataset.folder / "tokenizer/tokenizer.json")}
    assert len(problems) == 2


def test_a_foreign_file_among_the_shards_is_found(dataset):
    (dataset.folder / "shards" / "train-00001.bin").write_bytes(b"x")
    assert "is not in the manifest" in verify_dataset(dataset.folder)[0]


def test_a_truncated_shard_can_not_be_opened(dataset):
    path = dataset.split("train").shards[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Corrupted, match=str(path)):
        verify_dataset(dataset.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.array([5, 6, 9, 7, 1])}, "does not end with EOS"),
        ({"tokens": np.array([5, 6, 1, 400, 1])}, "holds id 400"),
        ({"offsets": np.array([0, 3, 3])}, "don't follow each other"),
        ({"hashes": np.array([0, 2**63], dtype=np.uint64)}, "belong to the other split"),
    ],
)
def test_a_shard_that_contradicts_itself_is_found(tmp_path, change, message):
    from llamapro.data.shard import Shard
    from llamapro.data.splits import is_heldout

    hashes = np.array([h for h in range(200) if not is_heldout(np.array([h], dtype=np.uint64), 0.5)[0]][:2])
    whole = {**vars(as_documents([[5, 6, 1], [7, 1]])), "hashes": hashes.astype(np.uint64)}
    facts = {**tokenization().model_dump(), "eos_inserted": True}
    stated = ShardFacts(**facts, split="train", shard=0, documents=2, tokens=5, text_bytes=15, plan="")
    write_shard(tmp_path / "whole.bin", stated, Documents(**whole))
    assert list(_contradictions(Shard.open(tmp_path / "whole.bin"), 0.5)) == []
    if "hashes" in change:
        change = {"hashes": np.array([h for h in range(200) if is_heldout(np.array([h], dtype=np.uint64), 0.5)[0]][:2])}
    write_shard(tmp_path / "bad.bin", stated, Documents(**{**whole, **change}))
    assert message in " ".join(_contradictions(Shard.open(tmp_path / "bad.bin"), 0.5))


@pytest.mark.parametrize(
    ("firsts", "spans", "fits"),
    [
        ([0, 2, 3], [0, 1, 2, 3, 0, 2], True),
        ([0, 0, 1], [0, 2], True),
        ([0, 0, 0], [], True),
        ([0, 2, 3], [0, 1, 1, 3, 0, 2], False),  # they touch: one span
        ([0, 2, 3], [2, 3, 0, 1, 0, 2], False),  # out of order
        ([0, 1, 2], [0, 4, 0, 2], False),  # beyond the document of 3 tokens
        ([0, 1, 2], [1, 1, 0, 2], False),  # empty
        ([0, 1, 1], [0, 1, 0, 2], False),  # of no document
        ([0, 1], [0, 1], False),
    ],
)
def test_spans_that_do_not_fit_their_documents_are_found(tmp_path, firsts, spans, fits):
    from llamapro.data.shard import Shard

    ids = as_documents([[5, 6, 1], [7, 1]])
    documents = {**vars(ids), "loss_offsets": np.array(firsts), "loss_spans": np.array(spans, dtype=np.int64)}
    stated = ShardFacts(
        **tokenization().model_dump(), split="train", shard=0, documents=2, tokens=5, text_bytes=15, plan=""
    )
    write_shard(tmp_path / "a.bin", stated, Documents(**documents))
    found = " ".join(_contradictions(Shard.open(tmp_path / "a.bin"), 0.0))
    assert ("spans of its documents" in found) != fits
