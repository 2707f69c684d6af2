"""A folder's manifest: what it is, and the size and digest of every file in it. Written last; trusted first."""

from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from llamapro.errors import Corrupted
from llamapro.files.atomic import write_atomic
from llamapro.files.digests import sha256_file, xxh3_file

MANIFEST_NAME = "manifest.json"
_DIGESTS = {"sha256": sha256_file, "xxh3-128": xxh3_file}


class FileEntry(BaseModel):
    """One file: its size in bytes and its digest as hexadecimal digits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class Manifest(BaseModel):
    """What a folder holds.

    Attributes:
        kind: what the folder is, e.g. "checkpoint", "dataset".
        format_version: of that kind.
        algorithm: "sha256" or "xxh3-128".
        files: by path relative to the folder, with "/".
        facts: whatever the kind wants to state about the whole; JSON values only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    format_version: int
    algorithm: str
    files: dict[str, FileEntry]
    facts: dict[str, Any]


def describe_files(folder: Path, algorithm: str = "sha256") -> dict[str, FileEntry]:
    """Size and digest of every file below `folder`, except the manifest, by relative path."""
    digest = _DIGESTS[algorithm]
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): FileEntry(size=path.stat().st_size, digest=digest(path)) for path in paths
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into its folder, durably."""
    write_atomic(folder / MANIFEST_NAME, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2))


def read_manifest(folder: Path, kind: str, format_version: int) -> Manifest:
    """Read a folder's manifest.

    Raises:
        Corrupted: there is none, it can't be read, or it is of another kind or a newer version.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise Corrupted(f"{folder} has no {MANIFEST_NAME}: it was never finished, or is not a {kind}") from error
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error
    if manifest.kind != kind:
        raise Corrupted(f"{folder} is a {manifest.kind}, not a {kind}")
    if manifest.format_version > format_version:
        raise Corrupted(
            f"{path} has format version {manifest.format_version}; this program reads up to {format_version}"
        )
    return manifest


def check_files(folder: Path, manifest: Manifest, *, digests: bool = True) -> list[str]:
    """Compare a folder with its manifest; returns one sentence per difference (sizes always, digests if asked)."""
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entry.size:
            problems.append(f"{path} has {size} bytes, the manifest says {entry.size}")
        elif digests and _DIGESTS[manifest.algorithm](path) != entry.digest:
            problems.append(f"{path} differs from its recorded digest")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = sorted(found - set(manifest.files) - {MANIFEST_NAME})
    return problems + [f"{folder / name} is not in the manifest" for name in extra]
