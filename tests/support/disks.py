"""Real file systems with real faults: too small, without free inodes, read-only, or cut off from their power."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

_NEW_FILE_ATTRIBUTES, _NEW_MOUNTS = 0x00000200, 0x00020000  # CLONE_FS, CLONE_NEWNS
IMAGE_BYTES = 48 << 20


def require_mounts(*, loop: bool = False) -> None:
    """Skip the test where no file system can be mounted; `loop`: one in a file."""
    if reason := _obstacle(loop):
        pytest.skip(reason)


def leave_mount_namespace() -> None:
    """What this thread, and the commands that it runs, mount from now on nobody else sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_FILE_ATTRIBUTES | _NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these mount options ("size=64k", "nr_inodes=20"), mounted while the block runs."""
    with _mounted(["-t", "tmpfs", "-o", options, "tmpfs"], folder) as place:
        yield place


def remount(folder: Path, options: str) -> None:
    """Change the options of what is mounted there."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def image_disk(image: Path, folder: Path) -> Iterator[Path]:
    """An ext4 file system in a file. Only what is asked for reaches the file: the kernel's own timers are slow."""
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)], check=True)
    with _mounted(["-o", "loop,commit=300", str(image)], folder) as place:
        yield place


def cut_power(image: Path, copy: Path) -> None:
    """What a disk holds at this moment, as a disk of its own."""
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)


@contextmanager
def switched_on(copy: Path, folder: Path) -> Iterator[Path]:
    """The disk after a power cut, mounted again: the file system replays its journal."""
    with _mounted(["-o", "loop", str(copy)], folder) as place:
        yield place


@contextmanager
def _mounted(arguments: list[str], folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@cache
def _obstacle(loop: bool) -> str:
    """Why file systems can't be mounted here; empty where they can."""
    if os.geteuid() != 0:
        return "only root can mount file systems"
    if loop and (shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists()):
        return "no mkfs.ext4 or no loop device"
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return "" if tried.returncode == 0 else f"nothing can be mounted here: {tried.stderr.decode().strip()}"
