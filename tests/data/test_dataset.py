"""Opening a dataset notices what is unfinished, exchanged, cut or foreign."""

import shutil

import pytest

from llamapro.data.dataset import Dataset
from llamapro.errors import Corrupted, DataError
from tests.support.data import random_documents, write_dataset


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "law", [random_documents(9, 9, 1), random_documents(9, 9, 2)], [[5, 6]])


def test_splits_and_counts(dataset):
    train = dataset.split("train")
    assert (train.documents, len(train.shards)) == (18, 2)
    assert train.tokens == sum(shard.facts.tokens for shard in train.shards) == train.text_bytes // 3
    assert dataset.split("heldout").tokens == 2


def test_a_folder_without_manifest_was_never_finished(dataset):
    (dataset.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished dataset"):
        Dataset.open(dataset.folder)


def test_exchanged_shards_are_noticed(dataset):
    first, second = (shard.path for shard in dataset.split("train").shards)
    shutil.move(first, dataset.folder / "x")
    shutil.move(second, first)
    shutil.move(dataset.folder / "x", second)
    with pytest.raises(Corrupted, match="is shard 1 of the train split.*exchanged"):
        Dataset.open(dataset.folder)


def test_a_shard_of_another_build_is_noticed(dataset, tmp_path):
    other = write_dataset(tmp_path / "other", [random_documents(9, 9, 3), random_documents(9, 9, 4)], [[5, 6]])
    shutil.copy(other.split("train").shards[0].path, dataset.split("train").shards[0].path)
    with pytest.raises(Corrupted, match="not the shard that the manifest lists"):
        Dataset.open(dataset.folder)


def test_a_missing_shard_is_noticed(dataset):
    dataset.split("train").shards[1].path.unlink()
    with pytest.raises(Corrupted, match="train-00001.bin can't be read"):
        Dataset.open(dataset.folder)


def test_an_edited_fingerprint_is_noticed(dataset):
    path = dataset.folder / "manifest.json"
    path.write_text(path.read_text().replace(dataset.fingerprint, "0" * 64))
    with pytest.raises(Corrupted, match="fingerprint"):
        Dataset.open(dataset.folder)


def test_the_fingerprint_is_of_the_contents_alone(dataset, tmp_path):
    shutil.move(dataset.folder, tmp_path / "renamed")
    assert Dataset.open(tmp_path / "renamed").fingerprint == dataset.fingerprint
    same = write_dataset(tmp_path / "again", [random_documents(9, 9, 1), random_documents(9, 9, 2)], [[5, 6]])
    other = write_dataset(tmp_path / "other", [random_documents(9, 9, 1), random_documents(9, 9, 2)], [[5, 7]])
    assert same.fingerprint == dataset.fingerprint != other.fingerprint


def test_another_tokenizer_is_refused(dataset):
    dataset.require_tokenizer("0" * 64, "base")
    with pytest.raises(DataError, match="another tokenizer than that of work/base.*--tokenizer work/base"):
        dataset.require_tokenizer("1" * 64, "work/base")
