"""Old `.bin` weights made into safetensors, on explicit request only, through torch's weights-only loader."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamapro.errors import Corrupted, ModelRefused
from llamapro.expansion.source import PICKLE_FILE, PICKLE_INDEX_FILE, read_json
from llamapro.files.atomic import remove_leftovers, remove_tree, staging_path
from llamapro.files.disk import require_free_space
from llamapro.files.tensors import CHUNK_BYTES, FLOAT_DTYPES, PlannedTensor, ShardWriter

if TYPE_CHECKING:
    import torch


@contextmanager
def converted_pickles(folder: Path, beside: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `beside` with a model's `.bin` weights as safetensors; removed at the end.

    Raises:
        ModelRefused: the pickles hold anything but plain float tensors.
    """
    files = _pickle_files(folder)
    target = beside.with_name(f"{beside.name}-base")
    require_free_space(beside, sum(file.stat().st_size for file in files), "the converted base")
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = staging_path(target)
    temporary.mkdir()
    try:
        _write_safetensors(files, temporary)
        yield temporary
    finally:
        remove_tree(temporary)


def _pickle_files(folder: Path) -> list[Path]:
    index = read_json(folder / PICKLE_INDEX_FILE)
    names = sorted(set((index or {}).get("weight_map", {}).values())) or [PICKLE_FILE]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise Corrupted(f"{folder} has no file {name}, which should hold weights")
    return [folder / name for name in names]


def _write_safetensors(files: list[Path], target: Path) -> None:
    tensors = {name: tensor for file in files for name, tensor in _load(file).items()}
    dtypes = {f"torch.{value}": key for key, value in FLOAT_DTYPES.items()}
    if odd := next((name for name, tensor in tensors.items() if str(tensor.dtype) not in dtypes), None):
        raise ModelRefused(f"tensor {odd} is {tensors[odd].dtype}: start from the unquantized model")
    plan = [PlannedTensor(name, dtypes[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(target, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _chunks(tensor))


def _load(file: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelRefused(f"{file} can't be loaded as plain weights: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelRefused(f"{file} holds something other than named tensors")
    return loaded


def _chunks(tensor: "torch.Tensor") -> Iterator[bytes]:
    import torch

    flat = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    for start in range(0, flat.size, CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].tobytes()
