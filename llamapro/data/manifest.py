"""The manifest of a dataset: what it is, how it was made, its splits and shards. Written last, read first."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llamapro.data.shard import SplitName, TokenizationFacts
from llamapro.errors import Corrupted, DataError
from llamapro.files.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest, write_manifest

DATASET_KIND = "dataset"
DATASET_FORMAT = 1
DIGEST_ALGORITHM = "xxh3-128"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Facts):
    """One shard: `file` relative to the dataset, `digest` its content digest."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    digest: str


class SplitEntry(_Facts):
    """One split: sums over its shards.

    Attributes:
        length_histogram: documents by length: entry i counts those of 2^i to 2^(i+1) - 1 tokens.
    """

    documents: int
    tokens: int
    text_bytes: int
    length_histogram: tuple[int, ...]
    shards: tuple[ShardEntry, ...]


class SourceFile(_Facts):
    """An input file: `name` relative to the inputs' common folder, `digest` of its first and last bytes."""

    name: str
    size: int
    digest: str


class DatasetManifest(TokenizationFacts):
    """What the manifest states about a dataset.

    Attributes:
        license: of the text, as the builder stated it; empty where nothing was stated.
        heldout_fraction: share of documents held out, by document hash.
        tokenizer_sha256: of the tokenizer's file.
        encoder: tokenizer library and version that made the ids.
        options: what else decided the contents.
        rejects: input rows left out, by reason.
        plan: digest of inputs, options and tokenizer.
    """

    name: str
    fingerprint: str
    license: str
    heldout_fraction: float
    tokenizer_sha256: str
    encoder: str
    options: dict[str, str]
    source_files: tuple[SourceFile, ...]
    rejects: dict[str, int]
    splits: dict[SplitName, SplitEntry]
    plan: str
    tool_version: str


def fingerprint_of(splits: Mapping[SplitName, SplitEntry]) -> str:
    """Hash of the content digests of all shards, 64 hexadecimal digits: names and places don't count."""
    lines = (f"{name} {shard.digest}" for name in sorted(splits) for shard in splits[name].shards)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_dataset_manifest(folder: Path) -> DatasetManifest:
    """The facts of a dataset's manifest; its files are not looked at.

    Raises:
        DataError: there is no dataset in the folder, or it was never finished.
        Corrupted: the manifest can't be read.
    """
    return _facts(folder, read_files_manifest(folder))


def read_files_manifest(folder: Path) -> Manifest:
    """The whole manifest of a dataset, with sizes and digests of its files; errors as above."""
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(
            f"{folder} holds no finished dataset ({MANIFEST_NAME} is missing); run `llamapro data build --output "
            f"{folder}`: a build that was interrupted continues"
        )
    return read_manifest(folder, DATASET_KIND, DATASET_FORMAT)


def write_dataset_manifest(folder: Path, facts: DatasetManifest, files: Mapping[str, FileEntry]) -> None:
    """Seal a dataset: from here on it is finished."""
    write_manifest(
        folder,
        Manifest(
            kind=DATASET_KIND,
            format_version=DATASET_FORMAT,
            algorithm=DIGEST_ALGORITHM,
            files=dict(files),
            facts=facts.model_dump(mode="json"),
        ),
    )


def _facts(folder: Path, manifest: Manifest) -> DatasetManifest:
    try:
        return DatasetManifest.model_validate(manifest.facts)
    except ValidationError as error:
        raise Corrupted(f"{folder / MANIFEST_NAME} can't be read: {error}") from error
