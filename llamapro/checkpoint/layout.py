"""Names of everything in a run's checkpoint folder, and the two JSON files beside the tensors.

- RUN/latest: name of the newest checkpoint (for people and tools; discovery reads manifests)
- RUN/checkpoints/step-00001200/: a committed checkpoint; "-r2" is added when a step is saved a second time
  - rank-00000.safetensors: one per rank: float32 slices named "<parameter>:<start>:<key>"
  - index.json: which slice of which parameter lies where
  - state.json: step, trainer state, versions, digest of the record
  - expansion.json: copy of the expansion record, where there is one
  - manifest.json: sizes and digests of all of these; written last
- RUN/checkpoints/quarantine-step-…/: a checkpoint that failed its check, kept for inspection
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

KIND = "checkpoint"
FORMAT_VERSION = 1
ALGORITHM = "xxh3-128"
POINTER_NAME = "latest"
INDEX_NAME = "index.json"
STATE_NAME = "state.json"
QUARANTINE = "quarantine-"
FLOAT32_BYTES = 4

_FOLDER = re.compile(r"step-(\d{8,})(?:-r(\d+))?")
_MEMBER = re.compile(r"rank-\d{5}\.safetensors|index\.json|state\.json|expansion\.json")

Count = Annotated[int, Field(ge=0)]


class IndexFragment(BaseModel):
    """Where one slice of a parameter lies.

    Attributes:
        file: name of the rank file.
        start: index of its first element in the flattened parameter.
        count: number of elements.
        offsets: key to the absolute byte offset of its first element in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    start: Count
    count: Count
    offsets: dict[str, Count]


class IndexedParameter(BaseModel):
    """A parameter's whole shape and its fragments in the order of their starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Count, ...]
    fragments: tuple[IndexFragment, ...]


class Index(BaseModel):
    """Every saved parameter, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: dict[str, IndexedParameter]


class SavedState(BaseModel):
    """What a checkpoint says besides tensors.

    Attributes:
        step: optimizer steps taken or skipped.
        optimizer_steps: updates applied, for the moments' bias correction.
        world_size: ranks that wrote it; any number can load it.
        record_digest: of the expansion record the weights belong to; null without a record.
        versions: of llamapro and the libraries that computed the state.
        trainer: the trainer's own state: progress, identity of the run, data stages, guard history, tracker ids.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    step: Count
    optimizer_steps: Count
    world_size: Count
    record_digest: str | None
    versions: dict[str, str]
    trainer: dict[str, JsonValue]


def folder_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_folder_name(name: str) -> tuple[int, int] | None:
    """(step, revision) of a checkpoint folder's name, or None for any other name."""
    match = _FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def free_folder(root: Path, step: int) -> Path:
    """Where to save a step: its usual folder, or the next free revision (a committed checkpoint is never replaced)."""
    target = root / folder_name(step)
    revision = 1
    while target.exists():
        revision += 1
        target = root / f"{folder_name(step)}-r{revision}"
    return target


def rank_file_name(rank: int) -> str:
    """Name of a rank's tensor file."""
    return f"rank-{rank:05d}.safetensors"


def is_member(name: str) -> bool:
    """Whether a checkpoint folder may hold a file of this name."""
    return _MEMBER.fullmatch(name) is not None


def pointer_path(root: Path) -> Path:
    """The file that names the newest checkpoint of the run whose checkpoints lie in `root`."""
    return root.parent / POINTER_NAME


def pointer_text(root: Path) -> str:
    """What the pointer says, whatever it is; empty only when there is no pointer."""
    path = pointer_path(root)
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").strip() or "nothing"


def read_pointer(root: Path) -> Path | None:
    """The folder the pointer names, or None when it is missing, unreadable or names no checkpoint."""
    try:
        name = pointer_path(root).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return root / name if parse_folder_name(name) and (root / name).is_dir() else None
