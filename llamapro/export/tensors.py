"""The tensors of an export, each a stream of checked bytes: frozen ones copied, trained ones cast from float32 masters.

Nothing is held in memory but a chunk. A frozen tensor whose bytes are not those of the record stops the export.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llamapro.checkpoint.tensors import Float32Array
from llamapro.errors import Corrupted, UserError
from llamapro.expansion.lineage import untrained_base_tensors
from llamapro.expansion.record import ExpansionRecord
from llamapro.export.carry import WrittenTensor
from llamapro.files.tensors import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    MAX_SHARD_BYTES,
    PlannedTensor,
    RunningDigest,
    ShardWriter,
    TensorFolder,
    cast_chunks,
)

MASTER_DTYPE = "F32"
OUTPUT_DTYPES: Mapping[str, str | None] = {"keep": None, "bf16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of an export.

    Attributes:
        planned: name, dtype and shape as written.
        chunks: begins to stream its bytes as written; checks what it reads.
        own: whether it differs from the base, so that a delta must hold it.
        folder_dtype: its dtype in the model folder that was trained.
    """

    planned: PlannedTensor
    chunks: Callable[[], Iterator[bytes]]
    own: bool
    folder_dtype: str


class TrainedTensors(Protocol):
    """Trained tensors by their names in the model folder, as a checkpoint holds them."""

    def names(self) -> tuple[str, ...]:
        """Of all of them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""

    def read_master(self, name: str) -> Iterator[Float32Array]:
        """A tensor's float32 values, flattened, in consecutive chunks."""


def merged_tensors(
    model: TensorFolder, record: ExpansionRecord | None, trained: TrainedTensors, dtype: str
) -> list[ExportTensor]:
    """Every tensor of the model folder, the trained ones from the checkpoint, in the folder's order.

    Args:
        dtype: a key of `OUTPUT_DTYPES`; "keep" is the folder's dtype, tensor by tensor.

    Raises:
        UserError: the checkpoint has tensors that the folder has not, or other shapes: it is of another model.
        Corrupted: the folder lacks a tensor of the record.
    """
    _require_same_model(model, trained)
    untouched = untouched_digests(record)
    if missing := sorted(set(untouched) - set(model.entries)):
        raise Corrupted(f"{model.folder} lacks the base tensor {missing[0]}; expand the base again")
    return [_merged(model, name, untouched.get(name), trained, dtype) for name in model.entries]


def untouched_digests(record: ExpansionRecord | None) -> dict[str, str]:
    """SHA-256 of the tensors in the model folder that must still be the base's."""
    return {name: digest.sha256 for name, digest in untrained_base_tensors(record).items()} if record else {}


def base_chunks(model: TensorFolder, name: str, sha256: str | None) -> Iterator[bytes]:
    """A tensor of the model folder.

    Raises:
        Corrupted: it is not what its digest says, after the last chunk.
    """
    if sha256 is None:
        return model.chunks(name)
    entry = model.entries[name]
    complaint = f"{entry.file}: base tensor {name} differs from the record; restore the folder or expand the base again"
    return checked(model.chunks(name), entry.dtype, sha256, complaint)


def checked(chunks: Iterable[bytes], dtype: str, sha256: str, complaint: str) -> Iterator[bytes]:
    """Pass a tensor's bytes on and compare their SHA-256 at the end.

    Raises:
        Corrupted: with this complaint, after the last chunk.
    """
    digest = RunningDigest(DTYPE_BYTES[dtype])
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.sha256 != sha256:
        raise Corrupted(complaint)


def write_tensors(
    folder: Path,
    tensors: Sequence[ExportTensor],
    advance: Callable[[int], None],
    *,
    only_own: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, WrittenTensor]:
    """Stream tensors into shards and digest all of them as written.

    Args:
        advance: told the number of bytes done.
        only_own: write only those that differ from the base; the others are still read and checked.
    """
    kept = [tensor.planned for tensor in tensors if tensor.own or not only_own]
    digests = {}
    with ShardWriter(folder, kept, max_shard_bytes) as writer:
        for tensor in tensors:
            digest = RunningDigest(DTYPE_BYTES[tensor.planned.dtype])
            stream = _watched(tensor.chunks(), digest, advance)
            if tensor.own or not only_own:
                writer.write(tensor.planned.name, stream)
            else:
                for _ in stream:
                    pass
            digests[tensor.planned.name] = WrittenTensor(tensor.planned.dtype, digest.sha256, digest.fold)
    return digests


def planned_bytes(tensors: Iterable[ExportTensor], *, only_own: bool = False) -> int:
    """Bytes that `write_tensors` will write."""
    return sum(tensor.planned.nbytes for tensor in tensors if tensor.own or not only_own)


def cast_dtype(folder_dtype: str, dtype: str) -> str:
    """The dtype a tensor is written in; tensors that are not floats keep theirs."""
    return (OUTPUT_DTYPES[dtype] or folder_dtype) if folder_dtype in FLOAT_DTYPES else folder_dtype


def _merged(model: TensorFolder, name: str, sha256: str | None, trained: TrainedTensors, dtype: str) -> ExportTensor:
    entry = model.entries[name]
    out = cast_dtype(entry.dtype, dtype)
    planned = PlannedTensor(name, out, entry.shape)
    if name in trained.names():
        return ExportTensor(planned, lambda: _masters(trained, name, out), True, entry.dtype)
    return ExportTensor(
        planned, lambda: cast_chunks(base_chunks(model, name, sha256), entry.dtype, out), sha256 is None, entry.dtype
    )


def _masters(trained: TrainedTensors, name: str, dtype: str) -> Iterator[bytes]:
    chunks = (values.tobytes() for values in trained.read_master(name))
    return cast_chunks(chunks, MASTER_DTYPE, dtype)


def _require_same_model(model: TensorFolder, trained: TrainedTensors) -> None:
    for name in sorted(trained.names()):
        shape = model.entries[name].shape if name in model.entries else None
        if shape != trained.shape(name):
            found = "does not have it" if shape is None else f"has it as {list(shape)}"
            raise UserError(
                f"the checkpoint holds {name} {list(trained.shape(name))}, {model.folder} {found}; pass the model "
                "folder that was trained as --model"
            )


def _watched(chunks: Iterable[bytes], digest: RunningDigest, advance: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        advance(len(chunk))
        yield chunk
