"""Saves on real file systems that run full, lose their power or may not be written."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamapro.checkpoint import save
from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.discover import find_checkpoint, list_checkpoints, prune
from llamapro.checkpoint.save import SaveFailed, stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.ranks import Ranks
from tests.checkpoint.test_crash import check_run
from tests.support.checkpoint import SlicedState, random_values, save_solo
from tests.support.disks import cut_power, image_disk, remount, require_mounts, small_disk, switched_on
from tests.support.file_operations import observed

SEEDS = {10: 1, 20: 2, 30: 3}
FILLER = "filler"


def fill(place: Path) -> None:
    """Take all the space that is left."""
    with (place / FILLER).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def no_allowance(patch: pytest.MonkeyPatch) -> None:
    """Let a save begin although hardly anything is free."""
    patch.setattr(save, "JSON_ALLOWANCE_BYTES", 0)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small disk with a checkpoint of step 10 in `run`."""
    require_mounts()
    no_allowance(monkeypatch)
    with small_disk(tmp_path / "disk", "size=256k,nr_inodes=60") as place:
        save_solo(place / "run" / "checkpoints", 10, seed=SEEDS[10])
        yield place


def begin(root: Path, step: int) -> BackgroundSave:
    state = SlicedState(random_values(SEEDS[step]))
    staged = stage_save(root, step, state, {"step": step}, None, Ranks.solo())
    return BackgroundSave(staged, SnapshotMemory.for_state(state))


def check_old_one_stands(root: Path) -> None:
    assert [path.name for path in root.iterdir()] == ["step-00000010"], "staging space was freed"
    assert check_run(root.parent, SEEDS) == 10


def test_a_disk_that_is_full_before_a_save_is_said_before_anything_is_written(disk: Path) -> None:
    fill(disk)
    with pytest.raises(SaveFailed, match="the checkpoint of step 20 needs .* free some space"):
        save_solo(disk / "run" / "checkpoints", 20, seed=SEEDS[20])
    check_old_one_stands(disk / "run" / "checkpoints")


def test_a_disk_that_fills_while_a_save_is_written(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank file is written, the files of the commit are not; with space again, the next save succeeds."""
    root = disk / "run" / "checkpoints"
    running = begin(root, 20)
    while not running.written:
        pass
    fill(disk)
    with pytest.raises(SaveFailed, match=r"No space left on device"):
        running.commit()
    check_old_one_stands(root)
    (disk / FILLER).unlink()
    begin(root, 20).commit()
    assert check_run(root.parent, SEEDS) == 20


def test_a_disk_without_room_for_the_rank_file(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "require_free_space", lambda *_: None)
    fill(disk)
    with pytest.raises(SaveFailed, match=r"rank 0: \[Errno 28\] No space left on device"):
        begin(disk / "run" / "checkpoints", 20).commit()
    check_old_one_stands(disk / "run" / "checkpoints")


@pytest.mark.parametrize("left", range(8))
def test_a_disk_with_space_but_no_inode(disk: Path, left: int) -> None:
    """At whichever file they run out, the save fails as one; nothing of it takes an inode after that."""
    root = disk / "run" / "checkpoints"
    fillers = disk / "fillers"
    fillers.mkdir()
    free = os.statvfs(disk).f_favail
    for number in range(free - left):
        (fillers / str(number)).touch()
    if left < 5:  # a folder, the rank file, three JSON files; the pointer may wait
        with pytest.raises(SaveFailed, match="No space left on device"):
            save_solo(root, 20, seed=SEEDS[20])
        assert os.statvfs(disk).f_favail == left
        check_old_one_stands(root)
    else:
        save_solo(root, 20, seed=SEEDS[20])
        shutil.rmtree(fillers)
        assert check_run(root.parent, SEEDS) == 20


def test_a_disk_that_becomes_read_only(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As ext4 does after an error: no save, but the run is still found, and says what it could not do."""
    root = disk / "run" / "checkpoints"
    remount(disk, "ro")
    with pytest.raises(SaveFailed, match="Read-only file system"):
        save_solo(root, 20, seed=SEEDS[20])
    found = find_checkpoint(root, Ranks.solo())
    assert found is not None and found.step == 10
    assert [entry.problem for entry in list_checkpoints(root, digests=True)] == [""]
    assert prune(root, keep=1, keep_every_steps=None) == []
    remount(disk, "rw")
    save_solo(root, 20, seed=SEEDS[20])
    remount(disk, "ro")
    assert prune(root, keep=1, keep_every_steps=None) == []
    assert "could not be deleted: [Errno 30]" in capfd.readouterr().err


def test_no_clock_decides_which_checkpoint_is_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of machines differ and jump; a run that continues must not."""
    root = tmp_path / "run" / "checkpoints"
    for step, now in ((10, 4e9), (20, 0.0), (30, 1e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        folder = save_solo(root, step, seed=SEEDS[step])
        for path in (folder, *folder.iterdir(), root.parent / "latest"):
            os.utime(path, (now, now))
    assert check_run(root.parent, SEEDS) == 30
    assert [path.name for path in prune(root, keep=1, keep_every_steps=None)] == ["step-00000020", "step-00000010"]


class PowerCuts:
    """Work on a disk whose power is cut before each of its operations: what each cut leaves.

    Attributes:
        left: per cut, the newest step that was reported as saved before, and what a restart finds.
    """

    def __init__(self, folder: Path, stride: int) -> None:
        self._folder = folder
        self._stride = stride
        self.left: list[tuple[int, int | None]] = []

    def during(self, work: Callable[[Path, Callable[[int], None]], None]) -> None:
        """Run `work(run, report)` on a disk with a durable checkpoint of step 10; examine what every cut leaves."""
        image, reported, copies = self._folder / "disk.img", [10], []

        def see(name: str, paths: tuple[str, ...]) -> None:
            copies.append((reported[-1], self._folder / f"cut-{len(copies)}"))
            if len(copies) % self._stride == 0:
                cut_power(image, copies[-1][1])

        with image_disk(image, self._folder / "disk") as place:
            run = place / "run"
            save_solo(run / "checkpoints", 10, seed=SEEDS[10])
            os.sync()
            with observed(see):
                work(run, reported.append)
            copies.append((reported[-1], self._folder / "at the end"))
            cut_power(image, copies[-1][1])
        for step, copy in copies:
            if copy.exists():
                with switched_on(copy, self._folder / "disk") as place:
                    self.left.append((step, self._found(place)))
                copy.unlink()

    def _found(self, place: Path) -> int | None:
        return check_run(place / "run", SEEDS)


def save_twice(run: Path, report: Callable[[int], None]) -> None:
    root = run / "checkpoints"
    save_solo(root, 20, seed=SEEDS[20])
    report(20)
    prune(root, keep=1, keep_every_steps=None)
    begin(root, 30).commit()
    report(30)


def check_cuts(cuts: PowerCuts, least: int) -> None:
    """A power cut loses no checkpoint that was reported, and what it leaves is whole."""
    assert all(found is not None and found >= reported for reported, found in cuts.left), cuts.left
    assert {found for _, found in cuts.left} == {10, 20, 30} and len(cuts.left) > least


def test_power_cuts_during_saves_and_pruning(tmp_path: Path) -> None:
    require_mounts(loop=True)
    cuts = PowerCuts(tmp_path, stride=12)
    cuts.during(save_twice)
    check_cuts(cuts, 6)


@pytest.mark.slow
def test_a_power_cut_before_every_operation_of_saves_and_pruning(tmp_path: Path) -> None:
    require_mounts(loop=True)
    cuts = PowerCuts(tmp_path, stride=1)
    cuts.during(save_twice)
    check_cuts(cuts, 60)


def test_without_fsync_a_power_cut_loses_what_was_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the cuts are real, and it is the fsyncs that the promise hangs on."""
    require_mounts(loop=True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    cuts = PowerCuts(tmp_path, stride=1000)
    cuts.during(save_twice)
    assert cuts.left == [(30, 10)]
