"""Small stages for tensors that are read, converted and written chunk by chunk."""

from collections.abc import Callable, Iterable, Iterator

from llamapro.files.tensors import RunningDigest, TensorFolder

Advance = Callable[[int], None]


def observed(chunks: Iterable[bytes], digest: RunningDigest) -> Iterator[bytes]:
    """Pass chunks on, adding each to a digest."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def counted(chunks: Iterable[bytes], advance: Advance, times: int = 1) -> Iterator[bytes]:
    """Pass chunks on, reporting each one's bytes, `times` over, once it was used."""
    for chunk in chunks:
        yield chunk
        advance(len(chunk) * times)


def sha256_of(tensors: TensorFolder, name: str, advance: Advance) -> str:
    """SHA-256 of one tensor's bytes."""
    digest = RunningDigest(tensors.entries[name].item_bytes)
    for chunk in tensors.chunks(name):
        digest.update(chunk)
        advance(len(chunk))
    return digest.sha256
