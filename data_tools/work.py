"""The work in progress of a build: its plan and what was committed, so that a killed build continues.

Every finished unit is a folder that appears whole, with the unit's documents and an entry that says what they are; the
set of these folders is the ledger.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.plan import BuildPlan
from llamapro.errors import Corrupted, DataError
from llamapro.files.atomic import write_atomic

WORK_FOLDER = ".building"
PLAN_NAME = "plan.json"
CONTAMINATION_NAME = "contamination.jsonl"
ENTRY_NAME = "entry.json"


class RejectExample(BaseModel):
    """One row that was left out; `row` in the unit, from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: int
    reason: str


class UnitEntry(BaseModel):
    """What a committed unit holds.

    Attributes:
        rows: rows read, blank and left-out ones included.
        rejects: rows left out, by reason; `examples` are the first of them.
        parts: sizes in bytes of its part files.
        contaminated: documents that hold text of evaluation items, left out or not.
        cut, cut_tokens: conversations that were too long, and the tokens they lost.
        unusable: the file is damaged, so that nothing of the unit is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    rows: int
    documents: int
    tokens: int
    text_bytes: int
    rejects: dict[str, int]
    examples: tuple[RejectExample, ...]
    parts: tuple[int, ...]
    unusable: bool = False
    contaminated: int = 0
    cut: int = 0
    cut_tokens: int = 0


class Work:
    """The folder of a build in progress.

    Args:
        folder: `.building` in the dataset's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adopt(self, plan: BuildPlan) -> None:
        """Begin, or continue a build that was begun under an equal plan.

        Raises:
            DataError: it was begun under another plan; says what differs and what to do.
        """
        if not (self.folder / PLAN_NAME).exists():
            write_atomic(self.folder / PLAN_NAME, plan.model_dump_json())
            return
        differences = self.plan().differences(plan)
        if differences:
            raise DataError(
                f"{self.folder.parent} holds an unfinished build that this can't continue: {'; '.join(differences)}. "
                f"Restore what changed, delete {self.folder}, or choose another --output"
            )

    def plan(self) -> BuildPlan:
        """The plan of the build."""
        path = self.folder / PLAN_NAME
        try:
            return BuildPlan.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise Corrupted(f"{path} can't be read; delete {self.folder} and build again: {error}") from error

    def unit_folder(self, unit: int) -> Path:
        """Where a unit is committed."""
        return self.folder / "units" / f"{unit:06d}"

    def contamination(self, unit: int) -> Path:
        """A committed unit's list of contaminated documents; exists where there are any."""
        return self.unit_folder(unit) / CONTAMINATION_NAME

    def part(self, unit: int, part: int) -> Path:
        """One of a committed unit's files."""
        return self.unit_folder(unit) / part_name(part)

    @property
    def shards(self) -> Path:
        """Where sealed shards are until all of them are."""
        return self.folder / "shards"

    @property
    def duplicates(self) -> Path:
        """Where the documents that are left out as duplicates are listed."""
        return self.folder / "duplicates"

    def sealed(self, name: str) -> Path:
        """Where a shard is sealed."""
        return self.shards / name

    def entry(self, unit: int) -> UnitEntry | None:
        """What a committed unit holds; None when it is not committed, or its files don't have their sizes."""
        path = self.unit_folder(unit) / ENTRY_NAME
        try:
            entry = UnitEntry.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        files = [self.part(unit, number) for number in range(len(entry.parts))]
        sizes = tuple(file.stat().st_size if file.exists() else -1 for file in files)
        return entry if sizes == entry.parts else None


def part_name(part: int) -> str:
    """The name of a unit's file."""
    return f"part-{part:05d}.bin"
