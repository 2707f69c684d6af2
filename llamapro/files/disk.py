"""Enough free disk space, checked before the work starts."""

import shutil
from pathlib import Path

from llamapro.errors import UserError

GIB = 1 << 30


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse to start when the file system of `folder` has less than `needed_bytes` free.

    Args:
        folder: an existing folder, or one that will be created (its nearest existing parent counts).
        purpose: what the space is for, e.g. "the expanded model".
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"{purpose} needs {needed_bytes / GIB:.1f} GiB, but {place} has {free / GIB:.1f} GiB free; "
            "free some space or choose another folder"
        )
