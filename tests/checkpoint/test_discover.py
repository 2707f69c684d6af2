"""Only checkpoints whose every byte agrees with their manifest are used; nothing is deleted or silently restarted."""

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from llamapro.checkpoint.discover import find_checkpoint, list_checkpoints, prune
from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.layout import parse_folder_name, pointer_path, read_pointer
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.errors import Corrupted, UserError
from llamapro.files.digests import xxh3_file
from llamapro.files.manifest import describe_files
from llamapro.ranks import Ranks
from tests.support.checkpoint import (
    SlicedState,
    gathered,
    on_threads,
    random_values,
    same_values,
    save_solo,
    tiny_record,
)

MEMBERS = ("rank-00000.safetensors", "index.json", "state.json", "expansion.json", "manifest.json")
RECORD = tiny_record({"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two valid checkpoints: step 10 of values 1, step 20 of values 2."""
    folder = tmp_path / "run" / "checkpoints"
    save_solo(folder, 10, seed=1, record=RECORD)
    save_solo(folder, 20, seed=2, record=RECORD)
    return folder


def found_step(root: Path) -> int | None:
    checkpoint = find_checkpoint(root, Ranks.solo())
    return checkpoint.step if checkpoint else None


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_valid_one_is_found_and_loads(root: Path) -> None:
    checkpoint = find_checkpoint(root, Ranks.solo())
    assert checkpoint is not None and checkpoint.step == 20
    state = SlicedState(None)
    load_checkpoint(checkpoint, state, Ranks.solo())
    assert same_values(gathered([state]), random_values(2))


def test_a_run_without_checkpoints_starts_fresh(tmp_path: Path) -> None:
    assert found_step(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert found_step(tmp_path / "checkpoints") is None


def test_order_is_by_step_and_revision_not_by_clock_or_name(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (9, 100_000_000, 99_999_999, 10):
        save_solo(root, step, seed=0)
    os.utime(root / "step-00000009", (4e9, 4e9))
    assert [entry.step for entry in list_checkpoints(root, digests=False)] == [100_000_000, 99_999_999, 10, 9]
    assert found_step(root) == 100_000_000
    assert parse_folder_name("step-00000012-r11") == (12, 11)
    assert [parse_folder_name(name) for name in ("step-12", "astep-00000012", "step-00000012-", "quarantine-x")] == [
        None
    ] * 4


def test_killed_saves_and_deletions_are_cleared(root: Path) -> None:
    for leftover in (".step-00000030.staging-0123abcd", ".step-00000005.trash-0123abcd"):
        shutil.copytree(root / "step-00000020", root / leftover)
    (root.parent / ".latest.staging-0123abcd").write_text("step-0")
    assert found_step(root) == 20
    assert names(root) == ["step-00000010", "step-00000020"]
    assert names(root.parent) == ["checkpoints", "latest"]


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def spoil_truncated(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_stale(folder: Path) -> None:
    shutil.copy(folder.with_name("step-00000010") / "rank-00000.safetensors", folder)


def spoil_swapped(folder: Path) -> None:
    (folder / "state.json").rename(folder / "x")
    (folder / "index.json").rename(folder / "state.json")
    (folder / "x").rename(folder / "index.json")


def spoil_replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000010"), folder)


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (spoil_truncated, "rank-00000.safetensors has"),
    "empty tensors": (lambda folder: (folder / MEMBERS[0]).write_bytes(b""), "rank-00000.safetensors has 0 bytes"),
    "missing tensors": (lambda folder: (folder / MEMBERS[0]).unlink(), "rank-00000.safetensors is missing"),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json can't be read"),
    "stale tensors": (spoil_stale, "rank-00000.safetensors differs from its recorded digest"),
    "swapped files": (spoil_swapped, "state.json has|index.json has"),
    "extra file": (lambda folder: (folder / "optimizer.pt").touch(), "optimizer.pt is not in the manifest"),
    "another step's folder": (spoil_replaced, "disagree about the step"),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_a_damaged_newest_one_is_set_aside_by_name_and_the_one_before_is_used(
    root: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILS[kind]
    spoil(root / "step-00000020")
    with pytest.raises(Corrupted, match=message):
        open_checkpoint(root / "step-00000020")
    assert found_step(root) == 10
    assert names(root) == ["quarantine-step-00000020", "step-00000010"]
    assert "quarantine-step-00000020" in capfd.readouterr().err
    assert (root.parent / "latest").read_text() == "step-00000010\n"
    # It stays aside, a second one gets its own name, and the run can save that step again.
    save_solo(root, 20, seed=3)
    assert found_step(root) == 20
    spoil_truncated(root / "step-00000020")
    assert found_step(root) == 10
    assert names(root) == ["quarantine-step-00000020", "quarantine-step-00000020.2", "step-00000010"]


def test_exchanged_rank_files_are_noticed(tmp_path: Path) -> None:
    from tests.checkpoint.test_restore import save_share

    folder = on_threads(2, lambda ranks: save_share(ranks, tmp_path / "checkpoints", "parameter"))[0]
    first, second = folder / "rank-00000.safetensors", folder / "rank-00001.safetensors"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    with pytest.raises(Corrupted, match="rank-0000"):
        open_checkpoint(folder)


@pytest.mark.parametrize("member", MEMBERS)
def test_flipped_bits_are_found_before_any_tensor_is_read(root: Path, member: str) -> None:
    bits = 8 * (root / "step-00000020" / member).stat().st_size
    check_flips(root / "step-00000020", member, random.Random(member).sample(range(bits), 40))


def check_flips(folder: Path, member: str, bits: Iterable[int]) -> None:
    original = (folder / member).read_bytes()
    wanted = open_checkpoint(folder)
    for bit in bits:
        flip_bit(folder / member, bit)
        try:
            checkpoint = open_checkpoint(folder)
        except Corrupted as error:
            assert str(folder) in str(error)
        else:
            # What a flip in the manifest leaves readable must still say the same.
            assert member == "manifest.json" and checkpoint == wanted, f"bit {bit} was not noticed"
        (folder / member).write_bytes(original)


def test_flipped_bits_pass_without_the_check(root: Path) -> None:
    """Control: the safetensors library itself accepts the flip."""
    from safetensors.torch import load_file

    path = root / "step-00000020" / "rank-00000.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}
    flip_bit(path, 8 * (path.stat().st_size - 5))
    after = load_file(path)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_every_flipped_byte_is_found(root: Path, member: str) -> None:
    folder = root / "step-00000020"
    check_flips(folder, member, range(3, 8 * (folder / member).stat().st_size, 8))


def test_when_none_is_valid_the_run_is_refused_every_time(root: Path) -> None:
    for folder in list(root.iterdir()):
        spoil_truncated(folder)
    before = names(root)
    for _ in range(2):
        with pytest.raises(Corrupted, match="no valid one; the run is not started afresh") as caught:
            found_step(root)
        assert names(root) == before
    assert "step-00000010" in str(caught.value) and "step-00000020" in str(caught.value)
    assert f"move {root} away" in str(caught.value)


def test_quarantined_ones_alone_are_no_fresh_start_either(root: Path) -> None:
    for folder in list(root.iterdir()):
        folder.rename(root / f"quarantine-{folder.name}")
    with pytest.raises(Corrupted, match="quarantine-step-00000010 was set aside before"):
        found_step(root)


def test_all_ranks_refuse_with_the_same_words(root: Path) -> None:
    for folder in list(root.iterdir()):
        flip_bit(folder / "rank-00000.safetensors", 8 * 700)
    errors = on_threads(3, lambda ranks: find_checkpoint(root, ranks))
    assert len({str(error) for error in errors}) == 1 and all(isinstance(error, Corrupted) for error in errors)


@pytest.mark.parametrize("member", MEMBERS)
def test_damage_that_only_one_rank_looks_at_is_known_to_all(root: Path, member: str) -> None:
    flip_bit(root / "step-00000020" / member, 80)
    found = on_threads(len(MEMBERS), lambda ranks: find_checkpoint(root, ranks))
    assert [checkpoint.step for checkpoint in found] == [10] * len(MEMBERS)


@pytest.mark.parametrize(
    "text", [None, b"", b"\xff\xfe garbage", b"step-00000099\n", b"../../etc\n", b"step-00000010\n"]
)
def test_the_pointer_is_never_trusted_and_is_repaired(root: Path, text: bytes | None) -> None:
    pointer = pointer_path(root)
    pointer.unlink() if text is None else pointer.write_bytes(text)
    assert found_step(root) == 20
    assert pointer.read_text() == "step-00000020\n"


def test_a_newer_format_is_not_read(root: Path) -> None:
    path = root / "step-00000020" / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**manifest, "format_version": 2}))
    with pytest.raises(Corrupted, match="format version 2; this program reads up to 1"):
        open_checkpoint(path.parent)
    assert found_step(root) == 10


def test_an_unreadable_file_is_named_and_the_one_before_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        if path.parent.name == "step-00000020" and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error", str(path))
        return xxh3_file(path)

    monkeypatch.setattr("llamapro.checkpoint.folder.xxh3_file", fail)
    with pytest.raises(Corrupted, match="rank-00000.safetensors can't be read: .*Input/output error"):
        open_checkpoint(root / "step-00000020")
    assert found_step(root) == 10


def test_a_folder_that_cannot_be_searched_is_named_on_every_rank(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    errors = on_threads(2, lambda ranks: find_checkpoint(root, ranks))
    assert [type(error) for error in errors] == [UserError] * 2
    assert str(errors[0]) == str(errors[1]) and "Permission denied" in str(errors[0]) and "run.folder" in str(errors[0])


def test_a_run_folder_that_cannot_be_written_still_continues(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, *_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    spoil_truncated(root / "step-00000020")
    monkeypatch.setattr("llamapro.checkpoint.discover.write_atomic", fail)
    monkeypatch.setattr(Path, "rename", fail)
    found = on_threads(2, lambda ranks: find_checkpoint(root, ranks))
    assert [checkpoint.step for checkpoint in found] == [10, 10]
    message = capfd.readouterr().err
    assert "renaming it failed" in message and "could not be pointed at" in message


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("member", [*MEMBERS, "mp_rank_00_model_states.pt"])
def test_a_planted_pickle_is_never_opened(root: Path, tmp_path: Path, member: str, resealed: bool) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Payload(canary))
    pickle.loads(payload)
    assert canary.exists(), "the payload works where pickles are loaded"
    canary.unlink()
    folder = root / "step-00000020"
    (folder / member).write_bytes(payload)
    if resealed and member != "manifest.json":
        reseal(folder)
    with pytest.raises(Corrupted):
        checkpoint = open_checkpoint(folder)
        checkpoint.record()
        load_checkpoint(checkpoint, SlicedState(None), Ranks.solo())
    assert not canary.exists()


def reseal(folder: Path) -> None:
    """Make the manifest agree with the planted file, as an attacker would."""
    path = folder / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    manifest["files"] = {name: entry.model_dump() for name, entry in describe_files(folder, "xxh3-128").items()}
    path.write_bytes(orjson.dumps(manifest))


def test_verify_reads_digests_and_ls_only_sizes(root: Path) -> None:
    flip_bit(root / "step-00000020" / "rank-00000.safetensors", 8 * 900)
    assert [entry.problem for entry in list_checkpoints(root, digests=False)] == ["", ""]
    damaged, good = list_checkpoints(root, digests=True)
    assert "differs from its recorded digest" in damaged.problem and not good.problem
    assert damaged.nbytes == sum(path.stat().st_size for path in damaged.folder.iterdir())


def fill(root: Path, steps: range) -> None:
    for step in steps:
        save_solo(root, step, seed=0)


def steps_left(root: Path) -> list[int]:
    return [entry.step for entry in reversed(list_checkpoints(root, digests=False))]


def test_prune_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    fill(root, range(1, 9))
    deleted = prune(root, keep=2, keep_every_steps=3)
    assert steps_left(root) == [3, 6, 7, 8]
    assert [path.name for path in deleted] == [f"step-0000000{step}" for step in (5, 4, 2, 1)]
    assert prune(root, keep=1, keep_every_steps=None) and steps_left(root) == [8]
    assert names(root) == ["step-00000008"]


def test_prune_keeps_the_newest_scheduled_one_behind_unscheduled_ones(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    fill(root, range(1, 9))
    assert len(prune(root, keep=2, keep_every_steps=None, keep_newest_of_every_steps=3)) == 5
    assert steps_left(root) == [6, 7, 8]
    fill(root, range(9, 12))
    prune(root, keep=1, keep_every_steps=None, keep_newest_of_every_steps=3)
    assert steps_left(root) == [9, 11]
    prune(root, keep=1, keep_every_steps=None, keep_newest_of_every_steps=100)
    assert steps_left(root) == [11]


def test_prune_never_deletes_what_latest_names_nor_what_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    fill(root, range(1, 6))
    pointer_path(root).write_text("step-00000001\n")
    assert read_pointer(root) == root / "step-00000001"
    spoil_truncated(root / "step-00000005")
    prune(root, keep=2, keep_every_steps=None)
    assert steps_left(root) == [1, 3, 4, 5]


def test_a_deletion_that_fails_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    root = tmp_path / "checkpoints"
    fill(root, range(1, 4))
    monkeypatch.setattr("llamapro.checkpoint.discover.remove_tree", fail)
    assert prune(root, keep=1, keep_every_steps=None) == []
    assert "step-00000001 could not be deleted" in capfd.readouterr().err
