"""lm-eval's tasks by name, with items from the hub or from an archive.

A task keeps lm-eval's own prompt and scoring; an archive only replaces where its items come from. Tasks that run what a
model wrote are this package's own files (same prompts), because lm-eval runs programs without a boundary: its other
tasks of that kind are refused.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import lm_eval.api.task  # type: ignore[import-untyped]
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.tasks._index import Kind  # type: ignore[import-untyped]
from lm_eval.tasks._yaml_loader import load_yaml  # type: ignore[import-untyped]

from llamapro.errors import UserError
from llamapro.evaluation.benchmarks.archive import Archive, Offline
from llamapro.evaluation.benchmarks.suite import Benchmark

TASK_FILES = Path(__file__).parent / "task_files"
SHOT_SEED = 1234  # lm-eval's own


class Tasks:
    """Every task that lm-eval knows, and this package's own before them."""

    def __init__(self, archive: Archive | None) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.archive = archive
        self._manager = TaskManager(include_path=str(TASK_FILES))

    def leaves(self, name: str) -> list[str]:
        """The single tasks of a task, group or tag.

        Raises:
            UserError: lm-eval knows no such name; names similar ones.
        """
        entry = self._manager.task_index.get(name)
        if entry is None:
            raise UserError(f"--tasks {name!r}: lm-eval has no such task{self._similar(name)}")
        if entry.kind is Kind.TAG:
            return sorted(entry.tags)
        if entry.kind is Kind.GROUP:
            members = load_yaml(entry.yaml_path, resolve_func=False)["task"]
            return [leaf for member in members for leaf in self.leaves(_member_name(name, member))]
        return [name]

    def offline(self, leaf: str) -> Offline | None:
        """Where the archive has a single task's items; None without an archive, too."""
        return self.archive.offline(leaf) if self.archive else None

    def require_no_open_door(self, leaf: str) -> None:
        """Check that lm-eval runs no program for a task.

        Raises:
            UserError: it would, outside the sandbox.
        """
        if self._raw(leaf).get("unsafe_code"):
            raise UserError(
                f"--tasks {leaf!r}: lm-eval would run the model's programs without a sandbox; humaneval, humaneval_64, "
                "mbpp and gsm8k_pot are run in one"
            )

    def build(self, leaf: str, benchmark: Benchmark) -> Any:
        """A single task, ready to be evaluated.

        Raises:
            UserError: its items can't be had.
        """
        offline = self.offline(leaf)
        try:
            task = self._from_archive(leaf, offline) if offline else self._from_hub(leaf)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"--tasks {leaf!r}: its items can't be read from the hub ({error}); without a network name the archive "
                "with --task-data"
            ) from error
        shots = benchmark.shots if benchmark.shots is not None else task.config.num_fewshot
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(SHOT_SEED)
        return task

    def _from_hub(self, leaf: str) -> Any:
        return self._manager.load([leaf])["tasks"][leaf]

    def _from_archive(self, leaf: str, offline: Offline) -> Any:
        assert self.archive is not None
        items = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in offline.splits(self.archive).items()}
        )
        definition = load_yaml(self._manager.task_index[leaf].yaml_path, resolve_func=True)
        for label in ("tag", "group", "task_list"):
            definition.pop(label, None)
        return ConfigurableTask(config=definition | dict(offline.changes) | {"custom_dataset": lambda **_: items})

    def _raw(self, leaf: str) -> dict[str, Any]:
        entry = self._manager.task_index[leaf]
        definition: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
        return definition

    def _similar(self, name: str) -> str:
        similar = [known for known in self._manager.all_tasks if name and name in known][:5]
        return f"; it has {', '.join(similar)}" if similar else "; their list: lm-eval ls tasks"


def _member_name(group: str, member: Any) -> str:
    if isinstance(member, str):
        return member
    raise UserError(f"--tasks {group!r}: this group changes its tasks; name the tasks themselves")


@contextmanager
def no_bars() -> Iterator[None]:
    """lm-eval and datasets draw bars for every task's prompts and items; not while this lasts."""
    drawn, quiet = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    lm_eval.api.task.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = drawn
        if not quiet:
            datasets.enable_progress_bars()
