"""Random histories of a run folder: saves, killed saves, pruning, damage and restarts in any order, against a model."""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llamapro.checkpoint.discover import find_checkpoint, list_checkpoints, prune
from llamapro.checkpoint.restore import load_checkpoint
from llamapro.files.manifest import MANIFEST_NAME
from llamapro.ranks import Ranks
from tests.support.checkpoint import SlicedState, gathered, random_values, same_values, save_solo
from tests.support.file_operations import killed_at

MOST_OPERATIONS = 60
QUICK = settings(max_examples=10, stateful_step_count=12)
LONG = settings(max_examples=300, stateful_step_count=40, derandomize=False, print_blob=True)


class RunFolderHistory(RuleBasedStateMachine):
    """Values of a step are those of the seed of the same number.

    Attributes:
        whole: steps of checkpoints that are there and good; `unsure`: of the last save, when it was killed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()) / "run" / "checkpoints"
        self.step = 0
        self.whole: list[int] = []
        self.unsure: int | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.root.parent.parent)

    @rule()
    def save(self) -> None:
        """Training goes on from a restart only, so what was unsure is known before the next save."""
        self.restart()
        self.step += 1
        save_solo(self.root, self.step, seed=self.step)
        self.whole.append(self.step)

    @rule(operation=st.integers(1, MOST_OPERATIONS))
    def save_and_be_killed(self, operation: int) -> None:
        self.restart()
        self.step += 1
        if killed_at(operation, partial(save_solo, self.root, self.step, self.step)):
            self.unsure = self.step
        else:
            self.whole.append(self.step)

    @rule(operation=st.integers(1, MOST_OPERATIONS))
    def restart_and_be_killed(self, operation: int) -> None:
        killed_at(operation, partial(find_checkpoint, self.root, Ranks.solo()))

    @precondition(lambda self: self.unsure is None and self.whole)
    @rule(keep=st.integers(1, 3), every=st.none() | st.integers(1, 4))
    def prune(self, keep: int, every: int | None) -> None:
        """By digests, as `llamapro checkpoint prune` does: whatever was damaged, as many whole ones stay."""
        prune(self.root, keep, every, digests=True)
        self.whole = [step for step in self.whole if step in self.whole[-keep:] or (every and step % every == 0)]

    @precondition(lambda self: self.unsure is None)
    @rule(keep=st.integers(1, 3))
    def save_and_prune(self, keep: int) -> None:
        """As a run does: the newest was written this moment, so sizes are enough for one to stay."""
        self.save()
        newest = [listed.step for listed in list_checkpoints(self.root, digests=False) if not listed.problem][:keep]
        prune(self.root, keep, None)
        self.whole = [step for step in self.whole if step in newest]

    @precondition(lambda self: self.unsure is None and len(self.whole) > 1)
    @rule(data=st.data())
    def damage_the_newest(self, data: st.DataObject) -> None:
        folder = self.root / f"step-{self.whole.pop():08d}"
        # A flipped bit in the manifest may leave it saying the same.
        path = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1]))])

    @rule()
    def restart(self) -> None:
        """The newest whole one is found, and it holds what was saved."""
        found = find_checkpoint(self.root, Ranks.solo())
        if self.unsure is not None and found is not None and found.step == self.unsure:
            self.whole.append(self.unsure)
        self.unsure = None
        assert (found.step if found else None) == (self.whole[-1] if self.whole else None)
        if found is not None:
            state = SlicedState(None)
            load_checkpoint(found, state, Ranks.solo())
            assert same_values(gathered([state]), random_values(found.step))

    @invariant()
    def nothing_whole_is_lost(self) -> None:
        """Whatever happened to the others; a step that was saved twice has two folders."""
        there = {listed.step for listed in list_checkpoints(self.root, digests=True) if not listed.problem}
        assert set(self.whole) <= there


def test_random_histories_of_a_run_folder() -> None:
    run_state_machine_as_test(RunFolderHistory, settings=QUICK)


@pytest.mark.slow
def test_many_random_histories_of_a_run_folder() -> None:
    run_state_machine_as_test(RunFolderHistory, settings=LONG)
