"""One rank's tensors as one safetensors file, written front to back in constant memory with its digest on the way."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import orjson
import torch
import xxhash

from llamapro.checkpoint.layout import FLOAT32_BYTES, IndexFragment
from llamapro.checkpoint.state import MASTER, Fragment
from llamapro.files.atomic import fsync_file
from llamapro.files.manifest import FileEntry

CHUNK_ELEMENTS = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True)
class RankFile:
    """A rank file before it is written: header, tensors in file order, and where each fragment will lie.

    Attributes:
        placed: for each fragment its parameter's name, whole shape and place.
        nbytes: size of the whole file.
    """

    header: bytes
    tensors: tuple[torch.Tensor, ...]
    placed: tuple[tuple[str, tuple[int, ...], IndexFragment], ...]
    nbytes: int


def plan_rank_file(file_name: str, fragments: Sequence[Fragment]) -> RankFile:
    """Lay out a rank's fragments, key by key, without copying them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors: list[torch.Tensor] = []
    relative: list[dict[str, int]] = []
    position = 0
    for fragment in fragments:
        _check(fragment)
        relative.append({})
        for key, tensor in fragment.tensors.items():
            end = position + FLOAT32_BYTES * tensor.numel()
            label = f"{fragment.name}:{fragment.start}:{key}"
            assert label not in entries, f"{label} is handed over twice"
            entries[label] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [position, end]}
            tensors.append(tensor)
            relative[-1][key] = position
            position = end
    header = _header(entries)
    places = zip(fragments, relative, strict=True)
    placed = tuple((f.name, f.shape, _place(file_name, f, starts, len(header))) for f, starts in places)
    return RankFile(header, tuple(tensors), placed, len(header) + position)


def write_rank_file(path: Path, plan: RankFile, cancelled: Event | None = None) -> FileEntry:
    """Write and fsync the file; its digest is that of the bytes in memory, so a disk that lies is caught at load.

    Args:
        cancelled: set by another thread to have the writing given up.

    Raises:
        OSError: the file system refused (full, quota, I/O error), or the writing was given up.
    """
    state = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in _pieces(plan):
            if cancelled is not None and cancelled.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), str(path))
            state.update(piece)
            _write_all(descriptor, piece)
        fsync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)  # at once: training may need the last of the disk before the save is given up
        raise
    finally:
        os.close(descriptor)
    return FileEntry(size=plan.nbytes, digest=state.hexdigest())


def _check(fragment: Fragment) -> None:
    assert MASTER in fragment.tensors, f"{fragment.name} has no {MASTER}"
    for key, tensor in fragment.tensors.items():
        good = tensor.dim() == 1 and tensor.dtype == torch.float32 and tensor.numel() == fragment.count
        assert good, f"{fragment.name}: {key} is {tensor.dtype} {tuple(tensor.shape)}, not {fragment.count} float32"


def _header(entries: dict[str, object]) -> bytes:
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _place(file_name: str, fragment: Fragment, starts: dict[str, int], header_bytes: int) -> IndexFragment:
    offsets = {key: header_bytes + start for key, start in starts.items()}
    return IndexFragment(file=file_name, start=fragment.start, count=fragment.count, offsets=offsets)


def _pieces(plan: RankFile) -> Iterator[memoryview]:
    yield memoryview(plan.header)
    for tensor in plan.tensors:
        flat = tensor.detach()
        for low in range(0, flat.numel(), CHUNK_ELEMENTS):
            yield flat[low : low + CHUNK_ELEMENTS].cpu().contiguous().numpy().data.cast("B")


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]
