"""A delta: only what training changed, and what is needed to rebuild the full export byte for byte.

    delta.json    what every tensor of the full export is, and where it comes from; written last
    README.md     how to rebuild
    tensors/      safetensors of the tensors that differ from the base
    files/        every other file of the full export, as it is there

No file of it has the name or place of a model's, so nothing loads a delta by mistake as if it were whole.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

import llamapro
from llamapro.errors import Corrupted
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.expansion.source import NEVER_COPIED
from llamapro.export.carry import WrittenTensor
from llamapro.export.tensors import ExportTensor, checked
from llamapro.files.atomic import write_atomic
from llamapro.files.digests import sha256_file
from llamapro.files.tensors import MAX_SHARD_BYTES, PlannedTensor, TensorFolder, cast_chunks

DELTA_NAME = "delta.json"
TENSORS = "tensors"
FILES = "files"
FORMAT_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeltaTensor(_Frozen):
    """One tensor of the full export.

    Attributes:
        dtype, shape, sha256: as the full export has it.
        own: whether the delta holds it; otherwise it comes from the base.
        folder_dtype: its dtype in the expanded model that was trained: a base in another dtype passes through it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    own: bool
    folder_dtype: str


class DeltaIndex(_Frozen):
    """The whole of delta.json.

    Attributes:
        base_id: what the model was expanded from, as its record calls it.
        base_digest: `ExpansionRecord.digest()` of the expanded model that was trained.
        tensors: in the order in which they fill the shards of the full export.
        files: SHA-256 of every file below files/, by relative path.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str = llamapro.__version__
    base_id: str
    base_digest: str
    max_shard_bytes: int = MAX_SHARD_BYTES
    tensors: tuple[DeltaTensor, ...]
    files: dict[str, str]


@dataclass(frozen=True)
class Delta:
    """A delta folder, its small files checked against their digests."""

    folder: Path
    index: DeltaIndex
    record: ExpansionRecord

    def copy_files(self, target: Path) -> None:
        """Copy every file of the full export that is no tensor file."""
        for name in self.index.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / FILES / name, target / name)


def write_index(
    folder: Path, tensors: list[ExportTensor], written: dict[str, WrittenTensor], trained_on: ExpansionRecord
) -> None:
    """Write delta.json and README.md into a delta folder whose tensors/ and files/ are there."""
    described = tuple(
        DeltaTensor(
            name=tensor.planned.name,
            dtype=tensor.planned.dtype,
            shape=tensor.planned.shape,
            sha256=written[tensor.planned.name].sha256,
            own=tensor.own,
            folder_dtype=tensor.folder_dtype,
        )
        for tensor in tensors
    )
    paths = sorted(path for path in (folder / FILES).rglob("*") if path.is_file())
    files = {path.relative_to(folder / FILES).as_posix(): sha256_file(path) for path in paths}
    index = DeltaIndex(base_id=trained_on.base_id, base_digest=trained_on.digest(), tensors=described, files=files)
    write_atomic(folder / "README.md", _readme(trained_on.base_id))
    write_atomic(folder / DELTA_NAME, index.model_dump_json(indent=1) + "\n")


def open_delta(folder: Path) -> Delta:
    """Read a delta and check its small files (the tensors are checked while they are streamed).

    Raises:
        Corrupted: it can't be read, is newer than this program, or a file is missing or changed.
    """
    path = folder / DELTA_NAME
    try:
        index = DeltaIndex.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error
    if index.format_version > FORMAT_VERSION:
        raise Corrupted(f"{path} has format version {index.format_version}; this program reads up to {FORMAT_VERSION}")
    for name, sha256 in index.files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or place.suffix in NEVER_COPIED:
            raise Corrupted(f"{path} names {name!r}, which is no file of an export")
        if not (folder / FILES / name).is_file() or sha256_file(folder / FILES / name) != sha256:
            raise Corrupted(f"{folder / FILES / name} is missing or differs from {DELTA_NAME}")
    record = read_record(folder / FILES)
    if record is None:
        raise Corrupted(f"{folder / FILES} has no expansion record")
    return Delta(folder, index, record)


def rebuilt_tensors(delta: Delta, base: Path) -> list[ExportTensor]:
    """Every tensor of the full export, from the delta and its base.

    Args:
        base: the original base, or the expanded model that was trained.

    Raises:
        Corrupted: the base lacks a tensor, or has it in another shape; while streaming: its bytes are others.
    """
    own, others = TensorFolder.open(delta.folder / TENSORS), TensorFolder.open(base)
    base_record = read_record(base)
    expanded = base_record is not None and base_record.digest() == delta.index.base_digest
    tensors = []
    for described in delta.index.tensors:
        if described.own:
            tensors.append(_from_folder(described, described.name, own, "the delta is damaged, fetch it again"))
            continue
        digest = delta.record.base_tensors.get(described.name)
        if digest is None:
            raise Corrupted(f"{delta.folder}: {described.name} comes from the base, but the record doesn't know it")
        name = described.name if expanded else digest.base_name
        advice = f"it is not the base of this delta, {delta.index.base_id}; pass that as --base"
        tensors.append(_from_folder(described, name, others, advice))
    return tensors


def _from_folder(described: DeltaTensor, name: str, folder: TensorFolder, advice: str) -> ExportTensor:
    entry = folder.entries.get(name)
    if entry is None or entry.shape != described.shape:
        found = "is missing" if entry is None else f"is {list(entry.shape)}, not {list(described.shape)}"
        raise Corrupted(f"{folder.folder}: tensor {name} {found}; {advice}")
    complaint = f"{entry.file}: tensor {name} differs from the one that the delta was made from; {advice}"

    through = described.dtype if described.own else described.folder_dtype

    def stream() -> Iterator[bytes]:
        in_folder_dtype = cast_chunks(folder.chunks(name), entry.dtype, through)
        as_written = cast_chunks(in_folder_dtype, through, described.dtype)
        return checked(as_written, described.dtype, described.sha256, complaint)

    planned = PlannedTensor(described.name, described.dtype, described.shape)
    return ExportTensor(planned, stream, described.own, described.folder_dtype)


def _readme(base_id: str) -> str:
    return (
        f"# A delta against {base_id}\n\n"
        "This folder holds only the tensors that training changed. Rebuild the model, byte for byte, with\n\n"
        f"    llamapro export THIS_FOLDER OUT --base {base_id}\n\n"
        "The model's own card is `files/README.md`.\n"
    )
