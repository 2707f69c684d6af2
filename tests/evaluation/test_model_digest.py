"""What a model is, and how it reads and writes text, are two digests."""

from pathlib import Path

import pytest

from llamapro.evaluation.model_digest import model_digest, words_digest
from tests.support.models import save_tiny_llama


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("generation_config.json", True),
        ("README.md", False),
        ("model.safetensors.index.json", False),
    ],
)
def test_words_are_the_tokenizers_files_and_nothing_else(tmp_path: Path, name: str, changed: bool) -> None:
    folder = save_tiny_llama(tmp_path / "model", blocks=1)
    words, model = words_digest(folder), model_digest(folder)
    (folder / name).write_text("other words")
    assert (words_digest(folder) != words) == changed
    if name != "model.safetensors.index.json":
        assert model_digest(folder) == model
