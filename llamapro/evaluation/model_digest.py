"""What a model *is*, as one digest: its tensors and its configuration, however they are cut into files."""

import hashlib
from pathlib import Path

from llamapro.files.tensors import TensorFolder

CONFIG_NAME = "config.json"


def model_digest(folder: Path) -> str:
    """SHA-256 over config.json and every tensor's name, dtype, shape and bytes, in the order of the names."""
    tensors = TensorFolder.open(folder)
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    for name in sorted(tensors.entries):
        entry = tensors.entries[name]
        digest.update(f"\0{name}\0{entry.dtype}\0{entry.shape}\0".encode())
        for chunk in tensors.chunks(name):
            digest.update(chunk)
    return digest.hexdigest()
