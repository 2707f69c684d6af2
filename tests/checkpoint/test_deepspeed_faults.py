"""Faults that DeepSpeed's own checkpoints have, made again on purpose in ours: a test of ours fails for each.

Here those of writing, finding and reading; `test_deepspeed_resume_faults` has those of a resumed run. Every fault is
run against the very test that keeps it out, which must pass without it.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoint import discover, folder, layout, restore, save
from llamapro.checkpoint.discover import find_checkpoint
from llamapro.checkpoint.folder import Checkpoint, open_checkpoint, read_checkpoint
from llamapro.checkpoint.layout import parse_folder_name, pointer_path
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.errors import Corrupted, UserError
from llamapro.files import atomic
from llamapro.files.manifest import FileEntry, read_manifest
from llamapro.ranks import Ranks
from llamapro.training.start_from import load_start, open_start
from tests.checkpoint import test_crash, test_discover, test_restore, test_save
from tests.support.checkpoint import (
    SlicedState,
    gathered,
    on_threads,
    random_values,
    same_values,
    save_solo,
    tiny_record,
)

FAILED = (AssertionError, pytest.fail.Exception, UserError)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two valid checkpoints: step 10 of values 1, step 20 of values 2."""
    folders = tmp_path / "run" / "checkpoints"
    save_solo(folders, 10, seed=1, record=test_discover.RECORD)
    save_solo(folders, 20, seed=2, record=test_discover.RECORD)
    return folders


def caught(test: Callable[..., Any], *arguments: Any) -> None:
    """That a test of ours fails."""
    with pytest.raises(FAILED):
        test(*arguments)


# 3.1.2: the pointer names a checkpoint of which the other ranks have written nothing


def pointer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = save.commit_folder

    def commit_after_pointing(staging: Path, target: Path) -> None:
        save._point_at(target)
        commit(staging, target)

    monkeypatch.setattr(save, "commit_folder", commit_after_pointing)


def test_a_pointer_that_moves_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_crash.test_everything_is_durable_before_it_gets_its_name(tmp_path / "without")
    pointer_first(monkeypatch)
    caught(test_crash.test_everything_is_durable_before_it_gets_its_name, tmp_path / "with")


def test_a_pointer_that_moves_before_the_data_misleads_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the pointer moved: DeepSpeed would load what is not there."""
    root = tmp_path / "checkpoints"
    save_solo(root, 10, seed=1)
    pointer_first(monkeypatch)

    def die(*_: Any) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(atomic, "fsync_tree", die)
    with pytest.raises(SystemExit):
        save_solo(root, 20, seed=2)
    assert pointer_path(root).read_text() == "step-00000020\n", "the fault is there"
    found = find_checkpoint(root, Ranks.solo())
    assert found is not None and found.step == 10
    assert pointer_path(root).read_text() == "step-00000010\n"


# 3.1.2 and 3.1.3: rank 0 goes on without asking whether the others have written


def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank believes that its own part was written, whatever the disk said."""
    gather = save._gather_shares

    def believe(staged: save.StagedSave, written: FileEntry | BaseException) -> list[dict[str, Any]]:
        size = staged.plan.nbytes
        return gather(staged, written if isinstance(written, FileEntry) else FileEntry(size=size, digest="0" * 32))

    monkeypatch.setattr(save, "_gather_shares", believe)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_that_nobody_asks_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    test_save.test_a_full_disk_on_one_rank_aborts_everywhere_and_training_can_go_on(
        tmp_path / "without", monkeypatch, rank
    )
    nobody_is_asked(monkeypatch)
    test = test_save.test_a_full_disk_on_one_rank_aborts_everywhere_and_training_can_go_on
    caught(test, tmp_path / "with", monkeypatch, rank)
    # What such a save leaves is not used either.
    found = find_checkpoint(tmp_path / "with" / "checkpoints", Ranks.solo())
    assert found is not None and found.step == 10


def test_a_rank_whose_file_is_missing_from_a_checkpoint_that_agrees_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' shares are forgotten by all: manifest and index know nothing of them."""
    root = tmp_path / "checkpoints"
    gather = save._gather_shares
    monkeypatch.setattr(save, "_gather_shares", lambda *arguments: gather(*arguments)[:1])
    failures = test_save.save_on(2, root, 20)
    assert all(isinstance(error, AssertionError) for error in failures), "the index does not cover the parameters"
    monkeypatch.setattr(save, "tiling_problem", lambda _: "")
    assert (root / "step-00000020").is_dir() or test_save.save_on(2, root, 20)
    with pytest.raises(Corrupted, match="elements are saved|is not in the manifest"):
        open_checkpoint(root / "step-00000020")


# 3.1.4: the pointer is truncated, then written; left empty, DeepSpeed ends with an assertion without a message


def test_a_pointer_that_is_truncated_and_then_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(path: Path, text: str) -> None:
        path.write_text(text)

    write = save.write_atomic
    monkeypatch.setattr(
        save, "write_atomic", lambda path, data: (in_place if path.name == "latest" else write)(path, data)
    )
    caught(test_crash.test_everything_is_durable_before_it_gets_its_name, tmp_path / "with")


@pytest.mark.parametrize("text", [None, b"", b"step-00000099\n"])
def test_a_start_that_believes_the_pointer(root: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None) -> None:
    """3.1.4 and 3.1.5: what DeepSpeed does without one, or with an empty one: a run from scratch, or an error."""
    test = test_discover.test_the_pointer_is_never_trusted_and_is_repaired
    test(root, text)

    def as_pointed(root: Path, ranks: Ranks) -> Checkpoint | None:
        path = pointer_path(root)
        if not path.exists():
            return None
        name = path.read_text().strip()
        assert name, ""
        return open_checkpoint(root / name) if (root / name).is_dir() else None

    monkeypatch.setattr(test_discover, "find_checkpoint", as_pointed)
    caught(test, root, text)


@pytest.mark.parametrize("left", ["quarantined", "damaged", "nothing but the pointer"])
def test_a_start_from_scratch_where_checkpoints_were(root: Path, left: str) -> None:
    """3.1.5: no message, no weights, and the run's work is buried."""
    for step in list(root.iterdir()):
        if left == "quarantined":
            step.rename(root / f"quarantine-{step.name}")
        elif left == "damaged":
            (step / "state.json").write_bytes(b"")
        else:
            shutil.rmtree(step)
    with pytest.raises(Corrupted, match="away"):
        find_checkpoint(root, Ranks.solo())
    pointer_path(root).unlink()
    if left == "nothing but the pointer":
        assert find_checkpoint(root, Ranks.solo()) is None, "now it is a new run"
    else:
        with pytest.raises(Corrupted, match="not started afresh"):
            find_checkpoint(root, Ranks.solo())


# 3.1.6: damaged shards: a missing one raises, a cut one is a bare OSError, one flipped bit loads


def sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared with its digest."""
    monkeypatch.setattr(folder, "check_digest", lambda *_: None)
    monkeypatch.setattr(discover, "check_digest", lambda *_: None)


def test_a_flipped_bit_that_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = test_discover.test_flipped_bits_are_found_before_any_tensor_is_read
    test(root, "rank-00000.safetensors")
    sizes_only(monkeypatch)
    caught(test, root, "rank-00000.safetensors")


@pytest.mark.parametrize("kind", ["truncated tensors", "empty tensors", "missing tensors", "extra file"])
def test_files_that_nobody_counts(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    sizes_only(monkeypatch)
    monkeypatch.setattr(folder, "check_files", lambda *_, **__: [])
    caught(test_discover.test_a_damaged_newest_one_is_set_aside_by_name_and_the_one_before_is_used, root, kind, capfd)


def test_a_cut_file_is_named_even_if_nobody_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence: reading beyond the end is no bare OSError and no half-filled tensor."""
    sizes_only(monkeypatch)
    monkeypatch.setattr(folder, "check_files", lambda *_, **__: [])
    test_discover.spoil_truncated(root / "step-00000020")
    checkpoint = open_checkpoint(root / "step-00000020")
    with pytest.raises(Corrupted, match=r"rank-00000\.safetensors ends 1 bytes too early"):
        load_checkpoint(checkpoint, SlicedState(None), Ranks.solo())


# 3.1.7: asked for the weights of one step, DeepSpeed takes those of the newest and returns the asked one's state


def check_weights_of_the_asked_step(root: Path) -> None:
    """A run that begins with the weights of an older checkpoint has that one's, and no optimizer state."""
    record = test_discover.RECORD
    start = open_start(root / "step-00000010", record)
    state = SlicedState(None)
    load_start(start, state, Ranks.solo())
    expected = {
        name: {key: values if key == "master" else torch.zeros_like(values) for key, values in keyed.items()}
        for name, keyed in random_values(1).items()
    }
    assert start.step == 10 and state.optimizer_steps == 0 and same_values(gathered([state]), expected)


def test_weights_of_the_newest_for_those_that_were_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_weights_of_the_asked_step(root)

    class Newest(restore.CheckpointTensors):
        def __init__(self, checkpoint: Checkpoint) -> None:
            pointed = layout.read_pointer(root)
            assert pointed is not None
            super().__init__(open_checkpoint(pointed))

    monkeypatch.setattr(restore, "CheckpointTensors", Newest)
    caught(check_weights_of_the_asked_step, root)


# 3.1.8: another world size is refused


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_each_rank_reads_only_the_file_of_its_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    test = test_restore.test_loading_at_any_world_size_is_bit_exact
    test(tmp_path / "without", sizes, ("parameter", "parameter"))

    def load_own_file(checkpoint: Checkpoint, state: SlicedState, ranks: Ranks) -> None:
        own = layout.rank_file_name(ranks.rank)
        parameters = {
            name: parameter.model_copy(
                update={"fragments": tuple(one for one in parameter.fragments if one.file == own)}
            )
            for name, parameter in checkpoint.index.parameters.items()
        }
        index = checkpoint.index.model_copy(update={"parameters": parameters})
        load_checkpoint(replace(checkpoint, index=index), state, ranks)

    monkeypatch.setattr(test_restore, "load_checkpoint", load_own_file)
    with pytest.raises((*FAILED, AttributeError)):  # a thread's error stands where its state should be
        test(tmp_path / "with", sizes, ("parameter", "parameter"))


def test_a_rank_that_finds_only_part_of_a_tensor_says_so(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    folders = on_threads(2, lambda ranks: test_restore.save_share(ranks, root, "parameter"))
    checkpoint = open_checkpoint(folders[0])
    parameters = {
        name: parameter.model_copy(update={"fragments": parameter.fragments[:1]})
        for name, parameter in checkpoint.index.parameters.items()
    }
    half = replace(checkpoint, index=checkpoint.index.model_copy(update={"parameters": parameters}))
    with pytest.raises(Corrupted, match="holds no elements"):
        load_checkpoint(half, SlicedState(None), Ranks.solo())


# 3.1.9: frozen weights are left out, and a wrong base is not noticed


def test_weights_of_another_expansion_are_begun_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_record({"model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match="another expanded model"):
        open_start(root / "step-00000010", other)
    # A record exchanged in the folder itself does not pass for the one that was saved.
    path = root / "step-00000010" / "expansion.json"
    path.write_text(other.model_dump_json())
    sizes_only(monkeypatch)
    monkeypatch.setattr(folder, "check_files", lambda *_, **__: [])
    damaged = read_checkpoint(root / "step-00000010", read_manifest(root / "step-00000010", "checkpoint", 1))
    with pytest.raises(Corrupted, match="is not the record"):
        damaged.record()


def test_every_step_has_its_own_folder_name() -> None:
    """Two steps can't share one, however the pointer is read."""
    names = [layout.folder_name(step) for step in (0, 1, 10, 99_999_999, 100_000_000)]
    assert [parse_folder_name(name) for name in names] == [(0, 1), (1, 1), (10, 1), (99_999_999, 1), (100_000_000, 1)]
