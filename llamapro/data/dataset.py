"""A dataset: a folder of sealed shards in two splits, described by its manifest.

A dataset without a manifest was never finished and can't be opened. The fingerprint is computed from the contents of
the shards, so a moved or renamed dataset is the same one, and a changed byte makes another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamapro.data.manifest import DatasetManifest, ShardEntry, SplitEntry, fingerprint_of, read_dataset_manifest
from llamapro.data.shard import Shard, SplitName
from llamapro.errors import Corrupted, DataError

SHARDS_FOLDER = "shards"
TOKENIZER_FOLDER = "tokenizer"
PACKS_FOLDER = "packs"


@dataclass(frozen=True)
class Split:
    """The documents of one split, over its shards; `fingerprint` is that of the whole dataset."""

    name: SplitName
    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int
    fingerprint: str


class Dataset:
    """An opened dataset.

    Args:
        folder: where it lies.
        manifest: its facts.
        splits: shards whose headers agree with the manifest.
    """

    def __init__(self, folder: Path, manifest: DatasetManifest, splits: Mapping[SplitName, Split]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits = splits

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open a dataset: manifest, fingerprint and every shard's header and size are checked.

        Raises:
            DataError: the folder holds no finished dataset.
            Corrupted: a shard is missing, cut, exchanged or damaged.
        """
        manifest = read_dataset_manifest(folder)
        if fingerprint_of(manifest.splits) != manifest.fingerprint:
            raise Corrupted(f"{folder}: the manifest's fingerprint is not that of the shards it lists; build it again")
        splits = {name: _open_split(folder, name, entry, manifest) for name, entry in manifest.splits.items()}
        return cls(folder, manifest, splits)

    @property
    def fingerprint(self) -> str:
        """Stands for the contents of all shards, 64 hexadecimal digits."""
        return self.manifest.fingerprint

    def split(self, name: SplitName) -> Split:
        """One of its splits; one without documents has no tokens."""
        return self._splits[name]

    def require_tokenizer(self, identity: str, model: str) -> None:
        """Refuse a model whose tokenizer gives other ids than the dataset's.

        Args:
            identity: of the model's tokenizer; model: how to call it in the message.
        """
        if identity != self.manifest.tokenizer_identity:
            raise DataError(
                f"{self.folder} was built with another tokenizer than that of {model}, so its ids mean other text; "
                f"build it again with `llamapro data build --tokenizer {model}`"
            )


def _open_split(folder: Path, name: SplitName, entry: SplitEntry, manifest: DatasetManifest) -> Split:
    shards = tuple(_open_shard(folder, name, number, shard) for number, shard in enumerate(entry.shards))
    return Split(name, shards, entry.documents, entry.tokens, entry.text_bytes, manifest.fingerprint)


def _open_shard(folder: Path, split: SplitName, number: int, entry: ShardEntry) -> Shard:
    shard = Shard.open(folder / entry.file)
    facts = shard.facts
    if (facts.split, facts.shard) != (split, number):
        raise Corrupted(f"{shard.path} is shard {facts.shard} of the {facts.split} split, and shard {number} of the "
                        f"{split} split belongs there; files were exchanged, put them back")  # fmt: skip
    if shard.content_digest != entry.digest:
        raise Corrupted(f"{shard.path} is not the shard that the manifest lists (another build, or a damaged header); "
                        "restore it from a copy, or build the dataset again")  # fmt: skip
    return shard
