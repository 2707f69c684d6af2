"""Atomic files and folders: staged beside the target, fsynced, renamed, parent fsynced.

A reader sees the old state or the new one, never half. What a killed writer leaves behind has a name that begins with
a dot and holds "staging" or "trash"; `remove_leftovers` clears it.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamapro.errors import UserError

STAGING = ".staging-"
TRASH = ".trash-"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file with this content, durably, in one step."""
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}{STAGING}{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which replaces `target` durably when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    staging = staging_path(target)
    try:
        yield staging
        fsync_file(staging)
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `target` when the block ends without an error.

    Raises:
        UserError: `target` exists, is not empty and `overwrite` is false.
    """
    require_free_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    staging = staging_path(target)
    staging.mkdir()
    try:
        yield staging
        commit_folder(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def require_free_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target folder that already holds something, unless it may be overwritten."""
    if overwrite or not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(f"{target} already exists and is not empty; choose another folder or pass --overwrite")


def staging_path(target: Path) -> Path:
    """A fresh name beside `target` for what is being written."""
    return target.with_name(f".{target.name}{STAGING}{uuid.uuid4().hex[:8]}")


def commit_folder(staging: Path, target: Path) -> None:
    """Fsync all of `staging`, move it to `target` (replacing what is there) and fsync the parent."""
    fsync_tree(staging)
    if target.exists():
        remove_tree(target)
    staging.rename(target)
    fsync_folder(target.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder by rename first, so that a killed deletion can't leave something that looks whole."""
    trash = path.with_name(f".{path.name}{TRASH}{uuid.uuid4().hex[:8]}")
    path.rename(trash)
    fsync_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what killed writers and killed deletions of `target` left beside it."""
    for kind in (STAGING, TRASH):
        for leftover in target.parent.glob(f".{target.name}{kind}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def discard(*outputs: Path) -> None:
    """Remove files and folders, and what killed writers left of them, where they are there."""
    for output in outputs:
        if not output.parent.is_dir():
            continue
        remove_leftovers(output)
        if output.is_dir():
            remove_tree(output)
        else:
            output.unlink(missing_ok=True)


def fsync_tree(folder: Path) -> None:
    """Fsync every file and folder below `folder`, and the folder itself."""
    for current, _, files in os.walk(folder):
        for name in files:
            fsync_file(Path(current) / name)
        fsync_folder(Path(current))


def fsync_file(path: Path) -> None:
    """Make the content of one file durable."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Make the names in one folder durable."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
