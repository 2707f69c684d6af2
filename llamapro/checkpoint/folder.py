"""One checkpoint folder: checked, then read. No tensor library is needed.

A `Checkpoint` exists only for a folder whose sizes and digests agree with its manifest, so whoever holds one may read.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llamapro.checkpoint.layout import (
    ALGORITHM,
    FLOAT32_BYTES,
    FORMAT_VERSION,
    INDEX_NAME,
    KIND,
    STATE_NAME,
    Index,
    IndexedParameter,
    SavedState,
    is_member,
    parse_folder_name,
)
from llamapro.errors import Corrupted
from llamapro.expansion.record import RECORD_NAME, ExpansionRecord
from llamapro.files.digests import xxh3_file
from llamapro.files.manifest import Manifest, check_files, read_manifest

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose bytes have been compared with its manifest.

    Attributes:
        folder: where it lies.
        step: optimizer steps taken or skipped when it was saved.
        state: its state.json.
        index: its index.json.
    """

    folder: Path
    step: int
    state: SavedState
    index: Index

    def record(self) -> ExpansionRecord | None:
        """The expansion record saved with the weights; None when the model had none."""
        if self.state.record_digest is None:
            return None
        record = _read(self.folder / RECORD_NAME, ExpansionRecord)
        if record.digest() != self.state.record_digest:
            raise Corrupted(f"{self.folder / RECORD_NAME} is not the record that {STATE_NAME} names")
        return record


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a folder completely and read it.

    Raises:
        Corrupted: naming the first file that is missing, cut, changed or too many.
    """
    manifest = read_checked_manifest(folder)
    for name in manifest.files:
        check_digest(folder, manifest, name)
    return read_checkpoint(folder, manifest)


def read_checked_manifest(folder: Path) -> Manifest:
    """A folder's manifest, after comparing names and sizes (no digests) with what is there.

    Raises:
        Corrupted: naming the first difference.
    """
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    if manifest.format_version != FORMAT_VERSION or manifest.algorithm != ALGORITHM:
        found = f"format version {manifest.format_version} with {manifest.algorithm}"
        raise Corrupted(f"{folder} has {found}, which never existed; its manifest is damaged")
    if strange := sorted(name for name in manifest.files if not is_member(name)):
        raise Corrupted(f"{folder}: its manifest names {strange[0]!r}, which is no file of a checkpoint")
    if missing := sorted({INDEX_NAME, STATE_NAME} - set(manifest.files)):
        raise Corrupted(f"{folder}: its manifest does not name {missing[0]}")
    try:
        problems = check_files(folder, manifest, digests=False)
    except OSError as error:
        raise Corrupted(f"{folder} can't be read: {error}") from error
    if problems:
        raise Corrupted(problems[0])
    return manifest


def check_digest(folder: Path, manifest: Manifest, name: str) -> None:
    """Compare one file's bytes with the manifest.

    Raises:
        Corrupted: naming the file.
    """
    try:
        found = xxh3_file(folder / name)
    except OSError as error:
        raise Corrupted(f"{folder / name} can't be read: {error}") from error
    if found != manifest.files[name].digest:
        raise Corrupted(f"{folder / name} differs from its recorded digest")


def read_checkpoint(folder: Path, manifest: Manifest) -> Checkpoint:
    """Read the JSON files of a folder whose files agree with `manifest`, and check that they agree with each other.

    Raises:
        Corrupted: naming the file and the contradiction.
    """
    state = _read(folder / STATE_NAME, SavedState)
    index = _read(folder / INDEX_NAME, Index)
    named = parse_folder_name(folder.name)
    steps = [state.step, manifest.facts.get("step"), *([named[0]] if named else [])]
    if any(step != state.step for step in steps):
        raise Corrupted(f"{folder}: name, manifest and {STATE_NAME} disagree about the step ({steps})")
    if state.format_version != FORMAT_VERSION:
        raise Corrupted(f"{folder / STATE_NAME} has format version {state.format_version}, expected {FORMAT_VERSION}")
    for name, parameter in index.parameters.items():
        problem = tiling_problem(parameter) or _range_problem(parameter, manifest)
        if problem:
            raise Corrupted(f"{folder / INDEX_NAME}: {name}: {problem}")
    if (RECORD_NAME in manifest.files) != (state.record_digest is not None):
        raise Corrupted(f"{folder}: {STATE_NAME} and the manifest disagree about {RECORD_NAME}")
    return Checkpoint(folder, state.step, state, index)


def tiling_problem(parameter: IndexedParameter) -> str:
    """Why fragments do not cover a parameter exactly once; empty when they do."""
    position = 0
    keys = {frozenset(fragment.offsets) for fragment in parameter.fragments}
    if len(keys) > 1:
        return "fragments hold different kinds of state"
    for fragment in parameter.fragments:
        if fragment.start != position:
            return f"elements from {min(position, fragment.start)} are {_gap(position, fragment.start)}"
        position += fragment.count
    total = prod(parameter.shape)
    return "" if position == total else f"{position} of {total} elements are saved"


def _gap(position: int, start: int) -> str:
    return "missing" if start > position else "saved twice"


def _range_problem(parameter: IndexedParameter, manifest: Manifest) -> str:
    for fragment in parameter.fragments:
        entry = manifest.files.get(fragment.file)
        if entry is None:
            return f"lies in {fragment.file!r}, which is not in the manifest"
        if any(offset + FLOAT32_BYTES * fragment.count > entry.size for offset in fragment.offsets.values()):
            return f"lies beyond the end of {fragment.file}"
    return ""


def _read(path: Path, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error
