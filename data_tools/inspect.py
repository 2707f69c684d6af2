"""A dataset shown to a reader: what its manifest states, how long its documents are, some of them decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_tools.chat.show import Part, marked_text
from data_tools.decoder import TextDecoder
from data_tools.tokenizer import tokenizer_file
from llamapro.data.arrays import AnyArray
from llamapro.data.dataset import TOKENIZER_FOLDER, Dataset
from llamapro.data.permutation import permutation_key, permute
from llamapro.data.shard import Shard, SplitName

SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class DecodedDocument:
    """One document: the split it is in, the input file and row (from 0) it came from, its length and text.

    Attributes:
        parts: the text in pieces, each with whether it is learned; None: all is.
    """

    split: SplitName
    file: str
    row: int
    tokens: int
    text: str
    parts: tuple[Part, ...] | None = None

    def shown(self, characters: int = SHOWN_CHARACTERS) -> str:
        """The beginning of the text, what is learned of it marked where that is not all."""
        if self.parts is not None:
            return marked_text(self.parts, characters)
        return self.text[:characters] + ("…" if len(self.text) > characters else "")


class Decoder:
    """Turns a dataset's ids back into text with the tokenizer that it keeps.

    Args:
        dataset: whose ids.
    """

    def __init__(self, dataset: Dataset) -> None:
        facts = dataset.manifest
        self._decoder = TextDecoder(tokenizer_file(dataset.folder / TOKENIZER_FOLDER))
        self._before = int(facts.bos_inserted)
        self._after = int(facts.eos_inserted)

    def decode(self, document: AnyArray) -> str:
        """The text of one whole document; what was inserted around it is left out."""
        return self.decode_part(document[self._before : document.size - self._after])

    def parts(self, document: AnyArray, spans: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
        """A document's text in pieces: what is outside and inside of ranges of its tokens, in turn."""
        bounds = [0, *(bound for span in spans for bound in span), document.size]
        pieces = [(self.decode_part(document[a:b]), bool(number % 2)) for number, (a, b) in enumerate(pairwise(bounds))]
        return tuple(piece for piece in pieces if piece[0])

    def decode_part(self, ids: AnyArray) -> str:
        """The text of some ids; special tokens among them are shown."""
        return self._decoder.texts([ids.tolist()])[0]


def facts_of(dataset: Dataset) -> list[tuple[str, str]]:
    """What a reader wants to know about a dataset, as label and value."""
    facts = dataset.manifest
    bos = "BOS before and " if facts.bos_inserted else ""
    ends = f"{bos}EOS ({facts.eos_id}) after each" if facts.eos_inserted else "what their chat template ends with"
    rows = [
        ("folder", str(dataset.folder)),
        ("fingerprint", facts.fingerprint[:16]),
        ("licence", facts.license or "not stated"),
        ("inputs", f"{len(facts.source_files):,} files, {sum(f.size for f in facts.source_files):,} bytes"),
        ("tokenizer", f"{facts.tokenizer_identity[:16]}, {facts.vocab_size:,} ids, read with {facts.encoder}"),
        ("documents end with", ends),
        ("stored as", f"{8 * int(facts.token_dtype[-1])}-bit ids"),
        ("held out", f"{facts.heldout_fraction:.2%} of documents, by hash"),
        *learned_of(dataset),
        ("left out", ", ".join(f"{count:,} × {reason}" for reason, count in facts.rejects.items()) or "no rows"),
    ]
    for name, split in facts.splits.items():
        text = f"{split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes:,} bytes of text"
        rows.append((name, f"{text}, {len(split.shards)} shards"))
    return rows


def learned_of(dataset: Dataset) -> list[tuple[str, str]]:
    """How conversations were read, and what is learned of them, as label and value; nothing for text."""
    stated = dataset.manifest.options
    if "chat_template" not in stated:
        return []
    shards = [shard for name in dataset.manifest.splits for shard in dataset.split(name).shards]
    tokens = sum(shard.facts.tokens for shard in shards)
    scored = sum(_scored_tokens(shard) for shard in shards)
    cut = f"{int(stated.get('cut_conversations', 0)):,} of them, {int(stated.get('cut_tokens', 0)):,} tokens lost"
    limit = f"beyond {stated['max_tokens']} tokens: {cut}" if "max_tokens" in stated else "no conversation"
    return [
        ("conversations", f"{stated['format']}, template {stated['chat_template']}"),
        ("learned", f"{stated['loss_on']}: {scored:,} of {tokens:,} tokens ({scored / max(1, tokens):.1%})"),
        ("cut", limit),
    ]


def _scored_tokens(shard: Shard) -> int:
    if not shard.has_loss_spans:
        return shard.facts.tokens
    bounds = shard.container.array("loss_spans").astype(np.int64)
    return int((bounds[1::2] - bounds[::2]).sum())


def histogram_of(dataset: Dataset) -> list[tuple[str, int, str]]:
    """Documents of both splits by length: range in tokens, how many, and a bar."""
    splits = [split.length_histogram for split in dataset.manifest.splits.values()]
    width = max(map(len, splits), default=0)
    counts = [sum(part[i] if i < len(part) else 0 for part in splits) for i in range(width)]
    largest = max(counts, default=0) or 1
    first = next((i for i, count in enumerate(counts) if count), 0)
    return [
        (f"{2**i:,} – {2 ** (i + 1) - 1:,}", counts[i], "█" * round(40 * counts[i] / largest))
        for i in range(first, width)
    ]


def samples_of(dataset: Dataset, count: int = SHOWN_SAMPLES) -> list[DecodedDocument]:
    """A few documents of the first shard of each split, always the same ones, decoded."""
    decoder = Decoder(dataset)
    shown = []
    for name in dataset.manifest.splits:
        for shard in dataset.split(name).shards[:1]:
            documents = shard.facts.documents
            wanted = np.arange(min(count, documents))
            chosen = permute(wanted, documents, permutation_key("inspect")).tolist() if documents else []
            for index in chosen:
                ids = shard.document(index)
                file = dataset.manifest.source_files[int(shard.column("source_files")[index])].name
                row = int(shard.column("source_rows")[index])
                spans = shard.loss_spans(index)
                parts = None if spans is None else decoder.parts(ids, spans)
                shown.append(DecodedDocument(name, file, row, ids.size, decoder.decode(ids), parts))
    return shown
