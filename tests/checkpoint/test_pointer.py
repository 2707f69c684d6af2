"""A run whose pointer outlived its checkpoints is no new run."""

import shutil
from pathlib import Path

import pytest

from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.layout import pointer_path, pointer_text
from llamapro.errors import Corrupted
from llamapro.ranks import Ranks
from tests.support.checkpoint import on_threads, save_solo


@pytest.mark.parametrize("text", [b"step-00000010\n", b"", b"\xff\xfe"])
@pytest.mark.parametrize("folder_left", [True, False])
def test_where_checkpoints_were_nothing_is_started_afresh(tmp_path: Path, text: bytes, folder_left: bool) -> None:
    """As after a clean-up by hand, or on a machine where the file system with the checkpoints is not mounted."""
    root = tmp_path / "checkpoints"
    save_solo(root, 10, seed=1)
    shutil.rmtree(root / "step-00000010" if folder_left else root)
    pointer_path(root).write_bytes(text)
    for error in on_threads(2, lambda ranks: find_checkpoint(root, ranks)):
        assert isinstance(error, Corrupted)
        assert str(root) in str(error) and f"move {pointer_path(root)} away to start afresh" in str(error)
    pointer_path(root).unlink()
    assert find_checkpoint(root, Ranks.solo()) is None


def test_an_unreadable_pointer_keeps_no_run_from_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    save_solo(root, 10, seed=1)

    def fail(path: Path, **_: str) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    found = find_checkpoint(root, Ranks.solo())
    assert found is not None and found.step == 10


def test_what_a_pointer_says(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert pointer_text(root) == ""
    for written, said in ((b"step-00000010\n", "step-00000010"), (b" \n", "nothing"), (b"\xff", "\ufffd")):
        pointer_path(root).write_bytes(written)
        assert pointer_text(root) == said
