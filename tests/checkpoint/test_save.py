"""A save is whole or absent, on every rank alike, and ends in the documented folder."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from llamapro.checkpoint import rank_file, save
from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.folder import open_checkpoint
from llamapro.checkpoint.layout import pointer_path
from llamapro.checkpoint.save import SaveFailed, save_checkpoint
from llamapro.files import atomic
from llamapro.ranks import Ranks
from tests.support.checkpoint import SHAPES, SlicedState, on_threads, random_values, save_solo, tiny_record


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_on(world_size: int, root: Path, step: int, seed: int = 0, cut: str = "parameter") -> list[Any]:
    values = random_values(seed)

    def work(ranks: Ranks) -> Path:
        state = SlicedState(values, ranks.rank, ranks.world_size, cut)
        return save_checkpoint(root, step, state, {"progress": {"step": step}}, None, ranks)

    return on_threads(world_size, work)


def test_a_checkpoint_has_the_documented_files(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    record = tiny_record({"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    folder = save_solo(root, 1200, seed=1, record=record)
    assert folder == root / "step-00001200"
    assert sorted(contents(folder)) == [
        "expansion.json",
        "index.json",
        "manifest.json",
        "rank-00000.safetensors",
        "state.json",
    ]
    assert (tmp_path / "latest").read_text() == "step-00001200\n"
    assert [path.name for path in root.iterdir()] == ["step-00001200"]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.record() == record
    assert checkpoint.state.record_digest == record.digest()
    assert checkpoint.state.trainer == {"step": 1200}
    assert checkpoint.state.optimizer_steps == 17
    assert set(checkpoint.index.parameters) == set(SHAPES)


def test_every_rank_writes_its_file_and_returns_the_same_folder(tmp_path: Path) -> None:
    folders = save_on(3, tmp_path / "checkpoints", 7)
    assert folders == [tmp_path / "checkpoints" / "step-00000007"] * 3
    assert sorted(path.name for path in folders[0].glob("rank-*")) == [f"rank-0000{r}.safetensors" for r in range(3)]
    assert open_checkpoint(folders[0]).state.world_size == 3


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (save_on(2, tmp_path / name / "checkpoints", 5)[0] for name in ("a", "b"))
    assert contents(first) == contents(second)


def test_saving_a_step_again_keeps_the_first_and_points_at_the_second(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first = save_solo(root, 5, seed=1)
    before = contents(first)
    second = save_solo(root, 5, seed=2)
    assert second.name == "step-00000005-r2"
    assert contents(first) == before
    found = find_checkpoint(root, Ranks.solo())
    assert found is not None and found.folder == second


def failing_write(rank: int, code: int) -> Callable[..., Any]:
    write = rank_file.write_rank_file

    def write_or_fail(path: Path, plan: Any) -> Any:
        entry = write(path, plan)
        if path.name == f"rank-{rank:05d}.safetensors":
            raise OSError(code, "No space left on device", str(path))
        return entry

    return write_or_fail


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_aborts_everywhere_and_training_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    root = tmp_path / "checkpoints"
    old = save_on(2, root, 10)[0]
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(save, "write_rank_file", failing_write(rank, errno.ENOSPC))
        errors = save_on(2, root, 20, seed=1)
    assert [type(error) for error in errors] == [SaveFailed, SaveFailed]
    assert str(errors[0]) == str(errors[1])
    assert f"rank {rank}: [Errno {errno.ENOSPC}]" in str(errors[0]) and "step-00000020" in str(errors[0])
    assert contents(tmp_path) == before
    assert [path.name for path in root.iterdir()] == [old.name]
    new = save_on(2, root, 20, seed=1)[0]
    assert new.name == "step-00000020" and open_checkpoint(new).step == 20


def test_a_real_full_file_system_is_reported_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr("os.open", lambda path, *rest, **more: real("/dev/full", os.O_WRONLY))
    with pytest.raises(SaveFailed, match=r"rank 0: \[Errno 28\] No space left on device"):
        save_solo(tmp_path / "checkpoints", 3, seed=0)
    monkeypatch.undo()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("function", ["write_manifest", "commit_folder"])
def test_an_error_while_rank_0_commits_aborts_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    root = tmp_path / "checkpoints"
    save_on(2, root, 10)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(save, function, fail)
    errors = save_on(2, root, 20)
    assert [str(error) for error in errors] == [
        f"the checkpoint step-00000020 was not saved: [Errno {errno.EIO}] Input/output error"
    ] * 2
    assert contents(tmp_path) == before


def test_a_rename_that_could_not_be_made_durable_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    save_on(2, root, 10)
    before, fsync = contents(tmp_path), atomic.fsync_folder
    failed = []

    def fail_once(path: Path) -> None:
        if path == root and not failed:
            failed.append((root / "step-00000020").exists())
            raise OSError(errno.EIO, "Input/output error")
        fsync(path)

    monkeypatch.setattr(atomic, "fsync_folder", fail_once)
    errors = save_on(2, root, 20)
    assert failed == [True], "the fault came after the rename"
    assert [type(error) for error in errors] == [SaveFailed, SaveFailed]
    assert contents(tmp_path) == before


def test_a_pointer_that_cannot_move_does_not_lose_the_checkpoint(tmp_path: Path, capfd: Any) -> None:
    root = tmp_path / "checkpoints"
    pointer_path(root).mkdir(parents=True)
    (pointer_path(root) / "occupied").touch()
    folder = save_solo(root, 4, seed=0)
    assert open_checkpoint(folder).step == 4
    assert "step-00000004 is saved" in capfd.readouterr().err


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    errors = save_on(2, tmp_path / "checkpoints", 9)
    assert [type(error) for error in errors] == [SaveFailed, SaveFailed]
    assert "checkpoint of step 9 needs" in str(errors[1])
    assert contents(tmp_path) == {}


def test_ranks_that_together_do_not_cover_a_parameter_are_a_bug(tmp_path: Path) -> None:
    values = random_values(0)

    def work(ranks: Ranks) -> Path:
        state = SlicedState(values, ranks.rank, 3)
        return save_checkpoint(tmp_path / "checkpoints", 1, state, {}, None, ranks)

    errors = on_threads(2, work)
    assert all(isinstance(error, AssertionError) and "elements are saved" in str(error) for error in errors)
    assert find_checkpoint(tmp_path / "checkpoints", Ranks.solo()) is None


def test_state_and_index_are_readable_json(tmp_path: Path) -> None:
    folder = save_solo(tmp_path / "checkpoints", 2, seed=0)
    state = orjson.loads((folder / "state.json").read_bytes())
    assert state["step"] == 2 and state["versions"]["torch"] == torch.__version__
    index = orjson.loads((folder / "index.json").read_bytes())
    place = index["parameters"]["model.layers.4.mlp.up_proj.weight"]["fragments"][0]
    assert place["file"] == "rank-00000.safetensors" and sorted(place["offsets"]) == ["exp_avg", "exp_avg_sq", "master"]
