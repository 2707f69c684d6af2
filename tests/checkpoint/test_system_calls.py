"""A save at each of its system calls, in the kernel's own words: killed before it, refused by it, in which order."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.discover import find_checkpoint, prune
from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.checkpoint.save import SaveFailed, stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.errors import Corrupted
from llamapro.ranks import Ranks
from tests.checkpoint.test_crash import check_run
from tests.support.checkpoint import SlicedState, gathered, random_values, same_values, save_solo
from tests.support.file_operations import DurabilityRules, observed
from tests.support.system_calls import CHANGING, REFUSED, Traced, require_strace, traced

SEEDS = {10: 1, 20: 2, 30: 3}
KILLED = -9
MOST_CALLS = 400
COARSE, EVERY = 9, 1


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A run with a checkpoint of step 10."""
    require_strace()
    save_solo(tmp_path / "prepared" / "checkpoints", 10, seed=SEEDS[10])
    warm_up = tmp_path / "warm-up"
    save_and_prune(warm_up)
    save_in_the_background(warm_up)
    find_checkpoint(warm_up / "checkpoints", Ranks.solo())
    return tmp_path / "prepared"


def save_and_prune(run: Path) -> None:
    save_solo(run / "checkpoints", 20, seed=SEEDS[20])
    prune(run / "checkpoints", keep=1, keep_every_steps=None)


def save_in_the_background(run: Path) -> None:
    state = SlicedState(random_values(SEEDS[20]))
    staged = stage_save(run / "checkpoints", 20, state, {"step": 20}, None, Ranks.solo())
    save = BackgroundSave(staged, SnapshotMemory.for_state(state))
    state.load(lambda name, key, start, count: torch.full((count,), 7.0), optimizer_steps=1)
    save.commit()
    prune(run / "checkpoints", keep=1, keep_every_steps=None)


def fresh_copies(tmp_path: Path, prepared: Path, stride: int) -> Iterator[tuple[int, Path]]:
    """Numbers of calls, from 1 on, each with a run of its own."""
    for number in range(1, MOST_CALLS, stride):
        run = tmp_path / f"run-{number}"
        shutil.copytree(prepared, run)
        yield number, run
        shutil.rmtree(run)
    raise AssertionError(f"the work still was not done after {MOST_CALLS} calls")


def kill_at_every_call(
    tmp_path: Path, prepared: Path, work: Callable[[Path], None], stride: int, *, threads: bool
) -> list[int | None]:
    """What a restart finds after `work` was killed at its n-th call that changes files, for n to the end."""
    found = []
    for number, run in fresh_copies(tmp_path, prepared, stride):
        inject = f"{','.join(CHANGING)}:signal=KILL:when={number}"
        done = traced(partial(work, run), tmp_path / "log", inject, threads=threads)
        assert done.code in (KILLED, 0), f"call {number}: ended with {done.code}"
        found.append(check_run(run, SEEDS))
        save_solo(run / "checkpoints", 30, seed=SEEDS[30])
        assert check_run(run, SEEDS) == 30, f"killed at call {number}, the run can't go on"
        if done.code == 0:
            return found
    raise AssertionError


def check_kills(found: list[int | None], least: int) -> None:
    assert set(found) == {10, 20} and found == sorted(found, key=lambda step: step or 0)
    assert len(found) > least


def test_killed_at_system_calls_of_a_save(tmp_path: Path, prepared: Path) -> None:
    check_kills(kill_at_every_call(tmp_path, prepared, save_and_prune, COARSE, threads=False), 5)


@pytest.mark.slow
def test_killed_at_every_system_call_of_a_save(tmp_path: Path, prepared: Path) -> None:
    check_kills(kill_at_every_call(tmp_path, prepared, save_and_prune, EVERY, threads=False), 40)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [False, True])
def test_killed_at_every_system_call_of_a_save_in_the_background(tmp_path: Path, prepared: Path, threads: bool) -> None:
    """Calls of the main thread alone; then those of whichever thread comes to its n-th first."""
    check_kills(kill_at_every_call(tmp_path, prepared, save_in_the_background, EVERY, threads=threads), 30)


# What the kernel answers, at which call; "+": from then on, as a disk that stays full.
REFUSALS = [
    *((call, error, "") for call in ("write", "fsync") for error in ("ENOSPC", "EIO", "EDQUOT")),
    *((call, error, "") for call in ("?rename,renameat,renameat2", "?mkdir,mkdirat") for error in ("ENOSPC", "EROFS")),
    ("fsync", "EIO", "+"),
    ("?rename,renameat,renameat2", "EIO", "+"),
]


@pytest.mark.parametrize(("call", "error", "on"), [("write", "ENOSPC", ""), ("fsync", "EIO", "+")])
def test_refused_system_calls_of_a_save(tmp_path: Path, prepared: Path, call: str, error: str, on: str) -> None:
    check_refusals(tmp_path, prepared, call, error, on, stride=4)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "error", "on"), REFUSALS)
def test_every_refused_system_call_of_a_save(tmp_path: Path, prepared: Path, call: str, error: str, on: str) -> None:
    check_refusals(tmp_path, prepared, call, error, on, stride=EVERY)


def check_refusals(tmp_path: Path, prepared: Path, call: str, error: str, on: str, stride: int) -> None:
    """Each save either failed, with the old state untouched, or it succeeded."""
    codes = []
    for number, run in fresh_copies(tmp_path, prepared, stride):
        save = partial(save_solo, run / "checkpoints", 20, SEEDS[20])
        done = traced(save, tmp_path / "log", f"{call}:error={error}:when={number}{on}", expected=SaveFailed)
        assert done.code in (0, REFUSED), f"{call} {number}: ended with {done.code}"
        codes.append(done.code)
        if done.code == REFUSED:
            check_untouched(run, prepared, leftovers=bool(on))
        assert check_run(run, SEEDS) == (10 if done.code else 20)
        if not refused(done, call, number):
            break
    assert REFUSED in codes and codes[-1] == 0


def refused(done: Traced, call: str, number: int) -> bool:
    """Whether there was an n-th such call; some are answered with an error by themselves."""
    names = {name.removeprefix("?") for name in call.split(",")}
    return sum(one.name in names for one in done.calls) >= number


def check_untouched(run: Path, prepared: Path, *, leftovers: bool) -> None:
    """A disk that stays broken may keep hidden leftovers; they are cleared at the next start."""
    left = contents(run)
    if leftovers:
        left = {name: data for name, data in left.items() if not any(part[0] == "." for part in Path(name).parts)}
    assert left == contents(prepared)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_kernel_saw_no_other_order_than_the_rules_of_durability_allow(tmp_path: Path, prepared: Path) -> None:
    """The same rules as in `test_crash`, on strace's word instead of our own wrappers'."""
    for work in (save_and_prune, save_in_the_background):
        run = tmp_path / work.__name__
        shutil.copytree(prepared, run)
        done = traced(partial(work, run), tmp_path / "log", threads=True)
        assert done.code == 0
        rules, seen = DurabilityRules(), set()
        for call in done.calls:
            if (operation := as_operation(call.name)) and all(str(run) in path for path in call.paths[-1:]):
                rules.see(operation, tuple(path for path in call.paths if str(run) in path))
                seen.add(operation)
        rules.finish()
        assert rules.violations == [] and {"fsync", "rename", "write", "mkdir"} <= seen


def test_a_call_that_another_threads_call_comes_between_is_seen_whole(tmp_path: Path) -> None:
    """Opening a pipe's reading end waits for a writer, so here two calls always run at once."""
    require_strace()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = traced(partial(open_both_ends, pipe), tmp_path / "log", threads=True)
    assert done.code == 0 and "resumed>" in (tmp_path / "log").read_text()
    opened = [call for call in done.calls if call.name == "openat" and str(pipe) in call.paths and call.result >= 0]
    assert len(opened) == 2


def open_both_ends(pipe: Path) -> None:
    reader = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDONLY)))
    reader.start()
    while True:
        with suppress(OSError):  # nobody reads yet
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            break
        time.sleep(0.01)
    reader.join()


def as_operation(name: str) -> str:
    """A system call's name in `file_operations`; empty for what changes nothing that a power cut could take."""
    plain = {"renameat": "rename", "renameat2": "rename", "mkdirat": "mkdir", "pwrite64": "write", "fdatasync": "fsync"}
    found = plain.get(name, name)
    return found if found in ("rename", "mkdir", "write", "fsync") else ""


def test_our_own_wrappers_miss_no_sync_and_no_rename(tmp_path: Path, prepared: Path) -> None:
    """What `file_operations` sees, and kills at, is all that the kernel sees."""
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        shutil.copytree(prepared, folder)
    counts = {"fsync": 0, "rename": 0, "replace": 0, "mkdir": 0}

    def see(name: str, paths: tuple[str, ...]) -> None:
        counts[name] = counts.get(name, 0) + 1

    with observed(see):
        save_and_prune(again)
    done = traced(partial(save_and_prune, run), tmp_path / "log")
    kernel = [as_operation(call.name) for call in done.calls]
    assert kernel.count("fsync") == counts["fsync"] > 10
    assert kernel.count("rename") == counts["rename"] + counts["replace"] > 4
    assert kernel.count("mkdir") == counts["mkdir"] > 0


@pytest.mark.parametrize("call", ["read", "preadv,preadv2"])
def test_an_input_error_at_any_read_of_a_load_names_the_file_or_takes_the_one_before(
    tmp_path: Path, prepared: Path, call: str
) -> None:
    """Nothing is loaded in part: what could not be read leaves the state as it was."""
    save_solo(prepared / "checkpoints", 20, seed=SEEDS[20])
    codes = []
    for number, run in fresh_copies(tmp_path, prepared, stride=3):
        done = traced(
            partial(load_whole_or_not_at_all, run),
            tmp_path / "log",
            f"{call}:error=EIO:when={number}",
            expected=Corrupted,
        )
        codes.append(done.code)
        assert done.code in (0, REFUSED), f"{call} {number}: ended with {done.code}"
        if not refused(done, call, number):
            break
    assert codes[-1] == 0 and len(codes) > 3


def load_whole_or_not_at_all(run: Path) -> None:
    os.environ["RANK"] = "1"  # says nothing
    checkpoint = find_checkpoint(run / "checkpoints", Ranks.solo())
    assert checkpoint is not None
    state = SlicedState(None)
    try:
        load_checkpoint(checkpoint, state, Ranks.solo())
    except Corrupted as error:
        assert "rank-00000.safetensors" in str(error)
        raise
    assert same_values(gathered([state]), random_values(SEEDS[checkpoint.step]))


def test_the_last_byte_of_a_short_read_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may give less than what was asked for at a time."""
    folder = save_solo(tmp_path / "checkpoints", 10, seed=SEEDS[10])
    preadv, asked = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(offset)
        return preadv(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", short)
    state = SlicedState(None)
    load_checkpoint(open_checkpoint(folder), state, Ranks.solo())
    assert same_values(gathered([state]), random_values(SEEDS[10]))
    assert len(asked) > sum(tensor.nbytes for _, keyed in state.slices.values() for tensor in keyed.values()) / 3
