"""Save a checkpoint: every rank writes, all ranks learn whether all succeeded, one rename makes it exist.

Staging folder beside the target → a file per rank, fsynced, digested → results gathered → index, state, record →
manifest → rename → parent fsynced → pointer. Whatever fails on whichever rank, every rank raises the same `SaveFailed`,
older checkpoints are untouched and training may go on.

`save_checkpoint` does all of it at once; `background` writes between `stage_save` and `commit_save` while training goes
on.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
from pydantic import JsonValue

import llamapro
from llamapro import console
from llamapro.checkpoint.folder import tiling_problem
from llamapro.checkpoint.layout import (
    ALGORITHM,
    FORMAT_VERSION,
    INDEX_NAME,
    KIND,
    STATE_NAME,
    Index,
    IndexedParameter,
    IndexFragment,
    SavedState,
    free_folder,
    pointer_path,
    rank_file_name,
)
from llamapro.checkpoint.rank_file import RankFile, plan_rank_file, write_rank_file
from llamapro.checkpoint.state import TrainingState
from llamapro.errors import LlamaproError, UserError
from llamapro.expansion.record import RECORD_NAME, ExpansionRecord
from llamapro.files.atomic import commit_folder, remove_tree, staging_path, write_atomic
from llamapro.files.digests import xxh3_file
from llamapro.files.disk import require_free_space
from llamapro.files.manifest import FileEntry, Manifest, write_manifest
from llamapro.ranks import Ranks

JSON_ALLOWANCE_BYTES = 1 << 24
_LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors")


class SaveFailed(LlamaproError):
    """A checkpoint could not be written; older ones are intact, its space is freed. Raised on every rank alike."""


@dataclass(frozen=True)
class StagedSave:
    """A checkpoint with a staging folder and nothing in it yet; the same on every rank but for the plan.

    Attributes:
        target: the folder that it becomes.
        saved: its state.json.
        plan: of this rank's file; its tensors are views of live state.
    """

    target: Path
    staging: Path
    saved: SavedState
    record: ExpansionRecord | None
    plan: RankFile
    ranks: Ranks

    @property
    def rank_file(self) -> Path:
        """Where this rank writes."""
        return self.staging / rank_file_name(self.ranks.rank)


def save_checkpoint(
    root: Path,
    step: int,
    state: TrainingState,
    trainer_state: Mapping[str, JsonValue],
    record: ExpansionRecord | None,
    ranks: Ranks,
) -> Path:
    """Commit a checkpoint of the whole job. Collective: every rank calls it with its own share of the state.

    Args:
        root: the run's checkpoints folder, on a file system that all ranks see; RUN/latest lies beside it.
        step: optimizer steps taken or skipped.
        trainer_state: the same JSON on every rank.
        record: the expansion record of the model that trains; None for a model without one.

    Returns:
        The new checkpoint's folder.

    Raises:
        SaveFailed: naming each rank that failed and why.
    """
    staged = stage_save(root, step, state, trainer_state, record, ranks)
    written: FileEntry | OSError
    try:
        written = write_rank_file(staged.rank_file, staged.plan)
    except OSError as error:
        written = error
    return commit_save(staged, written)


def stage_save(
    root: Path,
    step: int,
    state: TrainingState,
    trainer_state: Mapping[str, JsonValue],
    record: ExpansionRecord | None,
    ranks: Ranks,
) -> StagedSave:
    """Begin a save: check the space, name its folders, lay out the files. Collective; arguments as `save_checkpoint`.

    Raises:
        SaveFailed: on every rank.
    """
    saved = SavedState(
        format_version=FORMAT_VERSION,
        step=step,
        optimizer_steps=state.optimizer_steps,
        world_size=ranks.world_size,
        record_digest=record.digest() if record else None,
        versions=_versions(),
        trainer=dict(trainer_state),
    )
    plan = plan_rank_file(rank_file_name(ranks.rank), list(state.fragments()))
    target, staging = _open_staging(root, step, plan, ranks)
    return StagedSave(target, staging, saved, record, plan, ranks)


def commit_save(staged: StagedSave, written: FileEntry | BaseException) -> Path:
    """Make a staged checkpoint exist if every rank has written its file. Collective.

    Args:
        written: this rank's file, or why it could not be written.

    Returns:
        The new checkpoint's folder.

    Raises:
        SaveFailed: on every rank, naming each that failed and why; nothing is left of the save.
    """
    shares = _gather_shares(staged, written)
    index = _index(shares)
    problem = staged.ranks.broadcast_json(_complete(staged, shares, index) if staged.ranks.rank == 0 else "")
    if problem:
        _abandon(staged)
        raise SaveFailed(f"the checkpoint {staged.target.name} was not saved: {problem}")
    if staged.ranks.rank == 0:
        _point_at(staged.target)
    staged.ranks.barrier()
    return staged.target


def _open_staging(root: Path, step: int, plan: RankFile, ranks: Ranks) -> tuple[Path, Path]:
    """Rank 0 names target and staging folder for everybody, after checking that the whole checkpoint fits."""
    total = sum(ranks.sum_integers([plan.nbytes]))
    places: list[str] = []
    problem = ""
    if ranks.rank == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            require_free_space(root, total + JSON_ALLOWANCE_BYTES, f"the checkpoint of step {step}")
            target = free_folder(root.absolute(), step)
            staging = staging_path(target)
            staging.mkdir()
            places = [str(target), str(staging)]
        except (OSError, UserError) as error:
            problem = str(error)
    places, problem = ranks.broadcast_json([places, problem])
    if problem:
        raise SaveFailed(f"the checkpoint of step {step} was not saved: {problem}")
    return Path(places[0]), Path(places[1])


def _gather_shares(staged: StagedSave, written: FileEntry | BaseException) -> list[dict[str, Any]]:
    """What each rank has written and where its fragments lie in it; raises on all ranks when one has failed."""
    share: dict[str, Any]
    if isinstance(written, FileEntry):
        placed = [[name, shape, place.model_dump()] for name, shape, place in staged.plan.placed]
        share = {"file": staged.rank_file.name, "entry": written.model_dump(), "placed": placed}
    else:
        share = {"problem": str(written) if isinstance(written, OSError) else repr(written)}
    shares = staged.ranks.all_gather_json(share)
    failures = [f"rank {rank}: {s['problem']}" for rank, s in enumerate(shares) if "problem" in s]
    if failures:
        _abandon(staged)
        raise SaveFailed(f"the checkpoint {staged.target.name} was not saved: {'; '.join(failures)}")
    return shares


def _complete(staged: StagedSave, shares: list[dict[str, Any]], index: Index) -> str:
    """Write what rank 0 writes and make the folder exist by one rename; returns why not, empty when it exists."""
    try:
        files = {share["file"]: FileEntry.model_validate(share["entry"]) for share in shares}
        _write_json_files(staged.staging, files, staged.saved, index, staged.record)
        commit_folder(staged.staging, staged.target)
    except OSError as error:
        return str(error)
    return ""


def _point_at(target: Path) -> None:
    """Move the pointer. The checkpoint exists without it: discovery reads manifests and repairs it."""
    try:
        write_atomic(pointer_path(target.parent), f"{target.name}\n")
    except OSError as error:
        console.warning(f"{target.name} is saved, but {pointer_path(target.parent)} could not be moved to it: {error}")


def _write_json_files(
    staging: Path, files: dict[str, FileEntry], saved: SavedState, index: Index, record: ExpansionRecord | None
) -> None:
    contents = {INDEX_NAME: _json(index.model_dump()), STATE_NAME: _json(saved.model_dump())}
    if record is not None:
        contents[RECORD_NAME] = _json(record.model_dump(mode="json"))
    for name, content in contents.items():
        write_atomic(staging / name, content)
        files[name] = FileEntry(size=len(content), digest=xxh3_file(staging / name))
    facts = {"step": saved.step}
    manifest = Manifest(kind=KIND, format_version=FORMAT_VERSION, algorithm=ALGORITHM, files=files, facts=facts)
    write_manifest(staging, manifest)


def _index(written: list[dict[str, Any]]) -> Index:
    """All ranks' fragments by parameter; the same, and checked alike, on every rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: dict[str, list[IndexFragment]] = {}
    for result in written:
        for name, shape, place in result["placed"]:
            assert shapes.setdefault(name, tuple(shape)) == tuple(shape), f"ranks disagree about the shape of {name}"
            fragments.setdefault(name, []).append(IndexFragment.model_validate(place))
    parameters = {}
    for name, shape in sorted(shapes.items()):
        ordered = tuple(sorted(fragments[name], key=lambda fragment: fragment.start))
        parameters[name] = IndexedParameter(shape=shape, fragments=ordered)
        assert not (problem := tiling_problem(parameters[name])), f"{name}: {problem}"
    return Index(parameters=parameters)


def _abandon(staged: StagedSave) -> None:
    """Free the disk space of a failed save. What can't be removed is cleared at the next start.

    The target is there when it was renamed and its name could not be made durable.
    """
    if staged.ranks.rank == 0:
        shutil.rmtree(staged.staging, ignore_errors=True)
        with suppress(OSError):
            remove_tree(staged.target)


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)


def _versions() -> dict[str, str]:
    found = {"llamapro": llamapro.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
