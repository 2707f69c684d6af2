"""A kill at any file operation of a save leaves the old or the new checkpoint whole; the order of fsyncs holds."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from llamapro.checkpoint.background import BackgroundSave
from llamapro.checkpoint.discover import find_checkpoint, prune
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.checkpoint.save import stage_save
from llamapro.checkpoint.snapshot import SnapshotMemory
from llamapro.ranks import Ranks
from tests.support.checkpoint import SlicedState, gathered, random_values, same_values, save_solo
from tests.support.file_operations import DurabilityRules, killed_at, observed

RUN_FILES = {"checkpoints", "latest"}


def check_run(run: Path, seeds: dict[int, int]) -> int | None:
    """What a restart finds: a checkpoint whose tensors are those of its step, nothing half-written beside it."""
    root = run / "checkpoints"
    checkpoint = find_checkpoint(root, Ranks.solo())
    left = {path.name for path in run.rglob("*") if path.name.startswith((".", "quarantine"))}
    assert not left, f"left behind: {left}"
    assert {path.name for path in run.iterdir()} <= RUN_FILES
    if checkpoint is None:
        return None
    state = SlicedState(None)
    load_checkpoint(checkpoint, state, Ranks.solo())
    assert same_values(gathered([state]), random_values(seeds[checkpoint.step]))
    assert (run / "latest").read_text() == f"{checkpoint.folder.name}\n"
    return checkpoint.step


def sweep(tmp_path: Path, prepared: Path, work: Callable[[Path], object]) -> Iterator[tuple[int, Path, bool]]:
    """Kill `work(run)` at its 1st, 2nd, … operation, each time on a fresh copy of `prepared`, until it completes."""
    for operation in range(1, 1000):
        run = tmp_path / f"killed-{operation}"
        shutil.copytree(prepared, run)
        killed = killed_at(operation, partial(work, run))
        yield operation, run, killed
        shutil.rmtree(run)
        if not killed:
            return


def test_a_kill_at_any_operation_of_a_save_and_its_pruning(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    save_solo(prepared / "checkpoints", 10, seed=1)
    seeds = {10: 1, 20: 2, 30: 3}

    def save_and_prune(run: Path) -> None:
        save_solo(run / "checkpoints", 20, seed=2)
        prune(run / "checkpoints", keep=1, keep_every_steps=None)

    found = []
    for _, run, _ in sweep(tmp_path, prepared, save_and_prune):
        found.append(check_run(run, seeds))
        save_solo(run / "checkpoints", 30, seed=3)
        assert check_run(run, seeds) == 30
    assert found == sorted(found, key=lambda step: step or 0) and set(found) == {10, 20}
    assert len(found) > 30, "operations were seen"


def test_a_kill_at_any_operation_of_a_save_in_the_background(tmp_path: Path) -> None:
    """The thread's operations are among those at which the whole process is killed."""
    prepared = tmp_path / "prepared"
    save_solo(prepared / "checkpoints", 10, seed=1)

    def save_and_prune(run: Path) -> None:
        state = SlicedState(random_values(2))
        staged = stage_save(run / "checkpoints", 20, state, {"step": 20}, None, Ranks.solo())
        save = BackgroundSave(staged, SnapshotMemory.for_state(state))
        state.load(lambda name, key, start, count: torch.full((count,), 7.0), optimizer_steps=1)
        save.commit()
        prune(run / "checkpoints", keep=1, keep_every_steps=None)

    found = [check_run(run, {10: 1, 20: 2}) for _, run, _ in sweep(tmp_path, prepared, save_and_prune)]
    assert found == sorted(found, key=lambda step: step or 0) and set(found) == {10, 20}
    assert len(found) > 30, "operations were seen"


def test_a_kill_during_the_very_first_save_is_a_fresh_start_or_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    found = [
        check_run(run, {20: 2})
        for _, run, _ in sweep(tmp_path, tmp_path / "prepared", lambda run: save_solo(run / "checkpoints", 20, seed=2))
    ]
    assert found[0] is None and found[-1] == 20 and set(found) == {None, 20}


def test_a_kill_while_a_step_is_saved_again(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    save_solo(prepared / "checkpoints", 20, seed=2)
    for operation, run, killed in sweep(tmp_path, prepared, lambda run: save_solo(run / "checkpoints", 20, seed=2)):
        assert check_run(run, {20: 2}) == 20, f"killed ({killed}) at operation {operation}"


def test_a_kill_during_discovery_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    for step in (10, 20):
        save_solo(prepared / "checkpoints", step, seed=step)
    shutil.copytree(prepared / "checkpoints" / "step-00000020", prepared / "checkpoints" / ".step-00000030.staging-1")
    (prepared / "checkpoints" / "step-00000020" / "state.json").unlink()
    (prepared / "latest").write_text("garbage")
    for _, run, _ in sweep(tmp_path, prepared, lambda run: find_checkpoint(run / "checkpoints", Ranks.solo())):
        checkpoint = find_checkpoint(run / "checkpoints", Ranks.solo())
        assert checkpoint is not None and checkpoint.step == 10
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["quarantine-step-00000020", "step-00000010"]


def saved_under(rules: DurabilityRules, root: Path) -> None:
    with observed(rules.see):
        save_solo(root, 20, seed=2)
    rules.finish()


def test_everything_is_durable_before_it_gets_its_name(tmp_path: Path) -> None:
    save_solo(tmp_path / "checkpoints", 10, seed=1)
    rules = DurabilityRules()
    saved_under(rules, tmp_path / "checkpoints")
    assert rules.violations == []


def test_leaving_out_any_fsync_breaks_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is no empty one: each path that is fsynced has to be."""
    monkeypatch.setattr("uuid.uuid4", lambda: type("Same", (), {"hex": "0" * 32})())
    root = tmp_path / "checkpoints"
    save_solo(root, 10, seed=1)
    complete = DurabilityRules()
    saved_under(complete, root)
    unnoticed = set()
    for path in set(complete.synced):
        shutil.rmtree(root / "step-00000020")
        rules = DurabilityRules(forget=path)
        saved_under(rules, root)
        if not rules.violations:
            unnoticed.add(Path(path).name)
    # These were fsynced under their temporary names before.
    assert unnoticed == {"state.json", "index.json", "manifest.json"}
    assert len(set(complete.synced) - unnoticed) >= 10
