"""Saves that are written while the state changes: of the right moment, whole or absent, on every rank alike."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoint import background, rank_file
from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.rank_file import write_rank_file
from llamapro.checkpoint.save import SaveFailed, stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.files.manifest import FileEntry
from llamapro.ranks import Ranks
from tests.support.checkpoint import SlicedState, ThreadRanks, on_threads, random_values, save_solo
from tests.support.file_operations import DurabilityRules, observed

Write = Callable[..., FileEntry]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begin(root: Path, step: int, state: SlicedState, ranks: Ranks) -> BackgroundSave:
    return BackgroundSave(stage_save(root, step, state, {"step": step}, None, ranks), SnapshotMemory.for_state(state))


def spoil(state: SlicedState) -> None:
    """What training does to the state."""
    for _, tensors in state.slices.values():
        for tensor in tensors.values():
            tensor.add_(1)


def gated(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this is set."""
    gate = threading.Event()

    def write(*arguments: Any) -> FileEntry:
        assert gate.wait(20)
        return write_rank_file(*arguments)

    monkeypatch.setattr(background, "write_rank_file", write)
    return gate


def test_the_checkpoint_is_that_of_a_save_at_once_although_the_state_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(save_solo(tmp_path / "at-once" / "checkpoints", 5, seed=1))
    gate, state = gated(monkeypatch), SlicedState(random_values(1))
    save = begin(tmp_path / "run" / "checkpoints", 5, state, Ranks.solo())
    for _ in range(3):
        spoil(state)
        assert not save.written
    state.optimizer_steps += 3
    gate.set()
    assert contents(save.commit()) == expected
    changed = SlicedState(random_values(1))
    spoil(changed)
    assert contents(begin(tmp_path / "later" / "checkpoints", 5, changed, Ranks.solo()).commit()) != expected


def test_nothing_exists_before_the_commit_although_everything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save = begin(root, 5, SlicedState(random_values(1)), Ranks.solo())
    wait([save._written])
    assert save.written
    assert not (tmp_path / "latest").exists() and not list(root.glob("step-*"))
    save.commit()
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


def test_threads_that_write_take_part_in_no_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, callers = ThreadRanks.all_gather_json, set()

    def seen(self: ThreadRanks, value: Any) -> list[Any]:
        callers.add(threading.current_thread().name)
        return gather(self, value)

    monkeypatch.setattr(ThreadRanks, "all_gather_json", seen)
    values = random_values(1)
    folders = on_threads(
        3, lambda ranks: begin(tmp_path / "checkpoints", 5, SlicedState(values, ranks.rank, 3), ranks).commit()
    )
    assert folders == [tmp_path / "checkpoints" / "step-00000005"] * 3
    assert len(callers) == 3 and not any(name.startswith("checkpoint") for name in callers)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "rank 1: [Errno 28] No space left on device"),
        (MemoryError("no more"), "rank 1: MemoryError('no more')"),
    ],
)
def test_an_error_in_one_ranks_thread_fails_the_save_on_all_at_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    root = tmp_path / "checkpoints"
    save_solo(root, 1, seed=0)
    before = contents(tmp_path)
    values, memories = random_values(1), {}

    def write(path: Path, *rest: Any) -> FileEntry:
        entry = write_rank_file(path, *rest)
        if "step-00000005" in str(path) and path.name == "rank-00001.safetensors":
            raise error
        return entry

    def work(ranks: Ranks, step: int) -> Path:
        state = SlicedState(values, ranks.rank, 2)
        memory = memories.setdefault(ranks.rank, SnapshotMemory.for_state(state))
        return BackgroundSave(stage_save(root, step, state, {}, None, ranks), memory).commit()

    monkeypatch.setattr(background, "write_rank_file", write)
    failed = on_threads(2, lambda ranks: work(ranks, 5))
    assert [type(one) for one in failed] == [SaveFailed] * 2
    assert [str(one) for one in failed] == [f"the checkpoint step-00000005 was not saved: {said}"] * 2
    assert contents(tmp_path) == before and [path.name for path in root.iterdir()] == ["step-00000001"]
    assert on_threads(2, lambda ranks: work(ranks, 6)) == [root / "step-00000006"] * 2


def test_what_is_cancelled_ends_before_it_is_written_and_is_cleared_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_file, "CHUNK_ELEMENTS", 1)
    writing, go_on, pieces = threading.Event(), threading.Event(), []
    write = rank_file._write_all

    def slow(descriptor: int, piece: memoryview) -> None:
        pieces.append(piece)
        writing.set()
        assert go_on.wait(20)
        write(descriptor, piece)

    monkeypatch.setattr(rank_file, "_write_all", slow)
    root = tmp_path / "checkpoints"
    save = begin(root, 5, SlicedState(random_values(1)), Ranks.solo())
    assert writing.wait(20)
    threading.Timer(0.1, go_on.set).start()
    save.cancel()
    assert save.written and len(pieces) < 10
    assert find_checkpoint(root, Ranks.solo()) is None and list(root.iterdir()) == []


def test_everything_is_durable_before_it_gets_its_name(tmp_path: Path) -> None:
    save_solo(tmp_path / "checkpoints", 10, seed=1)
    rules = DurabilityRules()
    with observed(rules.see):
        begin(tmp_path / "checkpoints", 20, SlicedState(random_values(2)), Ranks.solo()).commit()
    rules.finish()
    assert rules.violations == []
    assert any(path.endswith("rank-00000.safetensors") for path in rules.synced)


def test_no_thread_is_left(tmp_path: Path) -> None:
    begin(tmp_path / "checkpoints", 5, SlicedState(random_values(1)), Ranks.solo()).commit()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join(5)
            assert not thread.is_alive()


def test_the_thread_touches_only_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU another thread's stream would not be ordered after the main thread's."""
    state, seen = SlicedState(random_values(1)), []
    live = {tensor.data_ptr() for _, tensors in state.slices.values() for tensor in tensors.values()}

    def write(path: Path, plan: rank_file.RankFile, cancelled: threading.Event) -> FileEntry:
        seen.extend(tensor.data_ptr() for tensor in plan.tensors)
        return write_rank_file(path, plan, cancelled)

    monkeypatch.setattr(background, "write_rank_file", write)
    begin(tmp_path / "checkpoints", 5, state, Ranks.solo()).commit()
    assert seen and not live & set(seen)


def test_a_short_write_to_a_full_disk_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        return real("/dev/full" if str(path).endswith(".safetensors") else path, flags & ~os.O_EXCL, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr("os.open", full)
        save = begin(tmp_path / "checkpoints", 5, SlicedState(random_values(1)), Ranks.solo())
        with pytest.raises(SaveFailed, match=r"rank 0: \[Errno 28\] No space left on device"):
            save.commit()
    assert contents(tmp_path) == {}
