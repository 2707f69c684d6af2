"""Datasets of real text, tokenized by the tiny models' tokenizer, and the same text for an independent scoring."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamapro.data.manifest import DatasetManifest, ShardEntry, SplitEntry, fingerprint_of, write_dataset_manifest
from llamapro.data.shard import Documents, ShardFacts, SplitName, write_shard
from llamapro.files.manifest import describe_files
from llamapro.training.tokenizer import model_tokenizer_identity
from tests.support.models import tiny_tokenizer

EOS = 1
TOKENIZATION = {
    "vocab_size": 320,
    "bos_id": 0,
    "eos_id": EOS,
    "pad_id": EOS,
    "bos_inserted": False,
    "eos_inserted": True,
    "token_dtype": "<u2",
}
LAW = tuple(
    f"Section {n}. The court shall hear appeal {n * n} in the {'first' if n % 2 else 'next'} year." for n in range(9)
)
WIKI = tuple(f"Größe {n}: the quick brown fox has {n} legs, naïve façade" + "!" * n for n in range(7))
ARTICLES = (*WIKI, *(f"Höhe {n}: {n} foxes jump over the {n + 1} lazy dogs of a naïve façade." for n in range(9)))
"""WIKI and more of the kind."""


def token_ids(text: str) -> list[int]:
    """A document as it stands in a dataset."""
    return [*tiny_tokenizer().encode(text, add_special_tokens=False), EOS]


def write_text_dataset(folder: Path, model: Path, heldout: Sequence[str], train: Sequence[str] = ()) -> Path:
    """A dataset of these documents, made with the tokenizer of `model`."""
    tokenization = {**TOKENIZATION, "tokenizer_identity": model_tokenizer_identity(model)}
    (folder / "shards").mkdir(parents=True)
    texts: dict[SplitName, Sequence[str]] = {"train": train, "heldout": heldout}
    splits = {name: _write_split(folder, name, documents, tokenization) for name, documents in texts.items()}
    facts = DatasetManifest(
        **tokenization,
        name=folder.name,
        fingerprint=fingerprint_of(splits),
        license="CC0-1.0",
        heldout_fraction=0.5,
        tokenizer_sha256="0" * 64,
        encoder="none",
        options={},
        source_files=(),
        rejects={},
        splits=splits,
        plan="test",
        tool_version="test",
    )
    write_dataset_manifest(folder, facts, describe_files(folder, "xxh3-128"))
    return folder


def _write_split(folder: Path, split: SplitName, texts: Sequence[str], tokenization: dict[str, object]) -> SplitEntry:
    if not texts:
        return SplitEntry(documents=0, tokens=0, text_bytes=0, length_histogram=(), shards=())
    ids = [token_ids(text) for text in texts]
    lengths = np.array([len(document) for document in ids])
    text_bytes = np.array([len(text.encode()) for text in texts])
    count = np.arange(len(texts))
    documents = Documents(
        tokens=np.concatenate([np.array(document) for document in ids]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        text_bytes=text_bytes,
        hashes=count,
        source_files=np.zeros_like(count),
        source_rows=count,
    )
    sizes = {"documents": len(texts), "tokens": int(lengths.sum()), "text_bytes": int(text_bytes.sum())}
    facts = ShardFacts.model_validate({**tokenization, **sizes, "split": split, "shard": 0, "plan": "test"})
    file = f"shards/{split}-00000.lps"
    digest = write_shard(folder / file, facts, documents)
    shard = ShardEntry(file=file, digest=digest, **sizes)
    return SplitEntry(length_histogram=(len(texts),), shards=(shard,), **sizes)
