"""What a build does, decided before it starts: input files, work units, tokenizer and options.

The plan decides every byte of the dataset. It is stored with the work in progress; a build continues only under an
equal plan, so that inputs or options that changed in between can't be mixed.
"""

from pathlib import Path
from typing import Literal

import orjson
import xxhash
from pydantic import BaseModel, ConfigDict

from data_tools.chat.options import ChatOptions
from data_tools.fim import FimOptions
from llamapro.data.shard import SplitName, TokenizationFacts

UNIT_BYTES = 64 << 20
# A worker holds one shard's tokens while it seals it. Where these would be too many files, they are larger.
SHARD_TEXT_BYTES = 256 << 20
MANY_SHARDS = 1024
LARGEST_SHARD_TEXT_BYTES = 2 << 30
BUILD_FORMAT = 2

TextSplit = Literal["file", "paragraph", "line"]
Dedup = Literal["none", "exact"]
Contaminated = Literal["unchecked", "drop", "report"]
FileFormat = Literal["jsonl", "json", "text", "parquet"]
Compression = Literal["", "gz", "zst"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputFile(_Frozen):
    """One input.

    Attributes:
        name: relative to the inputs' common folder; what datasets and messages call it.
        digest: XXH3-128 of its first and last 64 KiB.
        format: jsonl is an object a line, json one array of objects.
        modified_ns: modification time: a changed file is noticed while a build is unfinished.
        text_bytes: estimate of the uncompressed size.
    """

    path: Path
    name: str
    size: int
    digest: str
    modified_ns: int
    format: FileFormat
    compression: Compression
    text_bytes: int


class WorkUnit(_Frozen):
    """A part of one input, tokenized and committed as a whole.

    Attributes:
        file: number of the input.
        start: first byte, or first row group of a parquet file; stop: the end, None: of the file.
        first_row: row of the file that the unit begins with, where it is known beforehand.
        text_bytes: estimate of its text, for progress.
    """

    index: int
    file: int
    start: int
    stop: int | None
    first_row: int | None
    text_bytes: int


class ContentOptions(_Frozen):
    """The options that decide what is in the dataset.

    Attributes:
        text_field: of a JSON object or a parquet row.
        split: what one document of a plain text file is.
        heldout: share of documents that are held out.
        fim: which documents are rearranged for filling in, if any.
        dedup: whether documents with equal texts are left out but for the first.
        contaminated: what becomes of documents that hold text of evaluation items.
        chat: how rows become conversations; None: they hold text.
    """

    text_field: str
    split: TextSplit
    heldout: float
    fim: FimOptions | None = None
    dedup: Dedup = "none"
    contaminated: Contaminated = "unchecked"
    chat: ChatOptions | None = None

    @property
    def marks_scored(self) -> bool:
        """Whether only some tokens of each document are scored."""
        return self.chat is not None and self.chat.loss_on != "all"

    @property
    def flag_of_rows(self) -> str:
        """The flag that says what a row is."""
        return "--text-field" if self.chat is None else "--format"

    def stated(self) -> dict[str, str]:
        """As flags of the command line, without those that are not in use."""
        stated = {"text_field": self.text_field, "split": self.split, "heldout": f"{self.heldout:g}"}
        stated |= self.fim.stated() if self.fim else {}
        stated |= self.chat.stated() if self.chat else {}
        stated |= {"dedup": self.dedup} if self.dedup != "none" else {}
        return stated | ({"contaminated": self.contaminated} if self.contaminated != "unchecked" else {})


class TokenizerFacts(TokenizationFacts):
    """The tokenizer: `file` is its name ("tokenizer.json" or "tokenizer.model"), `sha256` of its bytes."""

    file: str
    sha256: str


class BuildPlan(_Frozen):
    """Everything that decides the dataset's bytes.

    Attributes:
        shards: number of shards of each split.
        tokenizer_folder: local folder that the tokenizer is read from.
        evaluation_files: whose text documents are searched for.
    """

    build_format: int
    files: tuple[InputFile, ...]
    units: tuple[WorkUnit, ...]
    options: ContentOptions
    tokenizer: TokenizerFacts
    tokenizer_folder: Path
    shards: dict[SplitName, int]
    evaluation_files: tuple[InputFile, ...] = ()

    def digest(self) -> str:
        """Hash of what decides the contents, wherever the files lie: 32 hexadecimal digits."""
        facts = {
            "build_format": self.build_format,
            "files": [(file.name, file.size, file.digest) for file in self.files],
            "units": [unit.model_dump() for unit in self.units],
            "options": self.options.model_dump(exclude={"chat"} if self.options.chat is None else None),
            "tokenizer": self.tokenizer.tokenizer_identity,
            "bos_inserted": self.tokenizer.bos_inserted,
            "eos_id": self.tokenizer.eos_id,
            "shards": self.shards,
            "evaluation_files": [(file.name, file.size, file.digest) for file in self.evaluation_files],
        }
        return xxhash.xxh3_128_hexdigest(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS))

    @property
    def part_dtype(self) -> str:
        """Element type of tokens in the work in progress: wide enough for the mark of `data_tools.chat.scored`."""
        return "<u4" if self.options.marks_scored else self.tokenizer.token_dtype

    def differences(self, other: "BuildPlan") -> list[str]:
        """What is different in `other`, one sentence each; empty when a build may continue."""
        return [
            *_file_differences("input", self.files, other.files),
            *_file_differences("evaluation file", self.evaluation_files, other.evaluation_files),
            *_option_differences(self.options, other.options),
            *_tokenizer_differences(self.tokenizer, other.tokenizer),
            *(["the program's build format changed"] if self.build_format != other.build_format else []),
        ]

    def bucket(self, split: SplitName, shard: int) -> int:
        """The number of a shard among those of both splits."""
        return shard if split == "train" else self.shards["train"] + shard


def shard_count(text_bytes: int) -> int:
    """Into how many shards this much text goes."""
    size = min(max(SHARD_TEXT_BYTES, text_bytes // MANY_SHARDS), LARGEST_SHARD_TEXT_BYTES)
    return max(1, -(-text_bytes // size))


def _file_differences(kind: str, before: tuple[InputFile, ...], now: tuple[InputFile, ...]) -> list[str]:
    old, new = ({file.name: file for file in files} for files in (before, now))
    lines = [f"{kind} {name} is gone" for name in sorted(old.keys() - new.keys())]
    lines += [f"{kind} {name} is new" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        if (old[name].size, old[name].digest) != (new[name].size, new[name].digest):
            lines.append(f"{kind} {name} changed (it had {old[name].size:,} bytes and has {new[name].size:,})")
        elif old[name].modified_ns != new[name].modified_ns:
            lines.append(f"{kind} {name} was modified")
    return lines


def _option_differences(before: ContentOptions, now: ContentOptions) -> list[str]:
    old, new = before.stated(), now.stated()
    return [
        f"--{name.replace('_', '-')} was {old.get(name, 'not given')} and is {new.get(name, 'not given')}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _tokenizer_differences(before: TokenizerFacts, now: TokenizerFacts) -> list[str]:
    fields = {"tokenizer_identity": "the tokenizer", "bos_inserted": "whether it adds BOS", "eos_id": "its EOS id"}
    return [f"{label} changed" for name, label in fields.items() if getattr(before, name) != getattr(now, name)]
