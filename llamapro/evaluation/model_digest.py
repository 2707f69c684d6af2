"""What a model *is*, as one digest: its tensors and its configuration, however they are cut into files."""

import hashlib
from pathlib import Path

from llamapro.files.tensors import TensorFolder

CONFIG_NAME = "config.json"
WORD_FILES = (
    *("tokenizer*", "*.model", "vocab*", "merges*", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates/*", "generation_config.json"),
)


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


def words_digest(folder: Path) -> str:
    """SHA-256 over the files that decide how a model reads and writes text: tokenizer, templates, ways of sampling."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WORD_FILES for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
