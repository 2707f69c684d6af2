"""What a user asks a build for."""

from dataclasses import dataclass
from pathlib import Path

from data_tools.chat.options import ChatRequest
from data_tools.fim import FimRequest
from data_tools.plan import Contaminated, Dedup, TextSplit
from llamapro.errors import UserError


@dataclass(frozen=True)
class BuildRequest:
    """The command line of a build.

    Attributes:
        inputs: files, folders and globs.
        tokenizer: model folder or hub id.
        text_field: of a JSON object or a parquet row that holds the text.
        split: what one document of a plain text file is.
        heldout: share of documents held out.
        license: of the text; empty: not stated.
        max_reject_fraction: share of rows that may be left out before the build fails.
        workers: processes.
        fim: which documents are rearranged for filling in.
        dedup: whether documents with equal texts are left out but for the first.
        decontaminate: evaluation files whose text documents are searched for; contaminated: what becomes of these.
        chat: what the rows are, and how conversations become documents.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output: Path
    text_field: str
    split: TextSplit
    heldout: float
    license: str
    max_reject_fraction: float
    workers: int
    fim: FimRequest = FimRequest()
    dedup: Dedup = "none"
    decontaminate: tuple[str, ...] = ()
    contaminated: Contaminated = "drop"
    chat: ChatRequest = ChatRequest()

    def __post_init__(self) -> None:
        shares = {"--heldout": self.heldout, "--max-reject-fraction": self.max_reject_fraction}
        problems = [
            f"{flag} {value}: give a share from 0 to 1" for flag, value in shares.items() if not 0.0 <= value <= 1.0
        ]
        if self.workers < 1:
            problems.append(f"--workers {self.workers}: give at least 1")
        if problems := [*problems, *self.fim.problems(), *self.chat.problems()]:
            raise UserError("\n".join(problems))
