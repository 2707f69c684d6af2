"""Which documents were in a sample: for hunting down the text behind a loss spike."""

from dataclasses import dataclass

from llamapro.data.arrays import AnyArray
from llamapro.data.loader import SampleStream


@dataclass(frozen=True)
class DocumentUse:
    """One piece of a document in a sample.

    Attributes:
        sample: number in the run; source: name; epoch: from 0.
        file: input file as the dataset names it; row: in that file, from 0.
        start: first token used, from the document's beginning; ids: the tokens used.
    """

    sample: int
    source: str
    epoch: int
    file: str
    row: int
    start: int
    ids: AnyArray


def documents_of_samples(stream: SampleStream, first: int, count: int) -> list[DocumentUse]:
    """The documents in samples first … first+count-1, in their order in the rows."""
    uses = []
    for number, address in enumerate(stream.addresses(first, count), start=first):
        source = stream.sources[address.source]
        pieces = stream.pieces(address)
        files = source.dataset.manifest.source_files
        for document, start, length in zip(pieces.documents, pieces.starts, pieces.lengths, strict=True):
            shard = pieces.shard
            ids = shard.document(int(document))[int(start) : int(start + length)]
            file = files[int(shard.column("source_files")[document])].name
            row = int(shard.column("source_rows")[document])
            uses.append(DocumentUse(number, source.name, address.epoch, file, row, int(start), ids))
    return uses
