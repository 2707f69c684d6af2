"""Save a checkpoint: every rank writes, all ranks learn whether all succeeded, one rename makes it exist.

Staging folder beside the target → a file per rank, fsynced, digested → results gathered → index, state, record →
manifest → rename → parent fsynced → pointer. Whatever fails on whichever rank, every rank raises the same `SaveFailed`,
older checkpoints are untouched and training may go on.
"""

import shutil
from collections.abc import Mapping
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
from llamapro.files.atomic import commit_folder, staging_path, write_atomic
from llamapro.files.digests import xxh3_file
from llamapro.files.disk import require_free_space
from llamapro.files.manifest import FileEntry, Manifest, write_manifest
from llamapro.ranks import Ranks

JSON_ALLOWANCE_BYTES = 1 << 24
_LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors")


class SaveFailed(LlamaproError):
    """A checkpoint could not be written; older ones are intact, its space is freed. Raised on every rank alike."""


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
    written = _write_shares(staging, plan, ranks)
    return _commit(target, staging, saved, written, record, ranks)


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


def _write_shares(staging: Path, plan: RankFile, ranks: Ranks) -> list[dict[str, Any]]:
    """Every rank writes its file; returns all ranks' results, or raises on all of them."""
    name = rank_file_name(ranks.rank)
    result: dict[str, Any]
    try:
        entry = write_rank_file(staging / name, plan)
        placed = [[name, shape, place.model_dump()] for name, shape, place in plan.placed]
        result = {"file": name, "entry": entry.model_dump(), "placed": placed}
    except OSError as error:
        result = {"problem": str(error)}
    results = ranks.all_gather_json(result)
    failures = [f"rank {rank}: {r['problem']}" for rank, r in enumerate(results) if "problem" in r]
    if failures:
        _abandon(staging, ranks)
        raise SaveFailed(f"the checkpoint {staging.name.split('.')[1]} was not saved: {'; '.join(failures)}")
    return results


def _commit(
    target: Path,
    staging: Path,
    saved: SavedState,
    written: list[dict[str, Any]],
    record: ExpansionRecord | None,
    ranks: Ranks,
) -> Path:
    """Rank 0 completes the folder, makes it exist by one rename and moves the pointer; the others wait for the word."""
    index = _index(written)
    problem = ""
    if ranks.rank == 0:
        try:
            files = {result["file"]: FileEntry.model_validate(result["entry"]) for result in written}
            _write_json_files(staging, files, saved, index, record)
            commit_folder(staging, target)
        except OSError as error:
            problem = str(error)
    problem = ranks.broadcast_json(problem)
    if problem:
        _abandon(staging, ranks)
        raise SaveFailed(f"the checkpoint {target.name} was not saved: {problem}")
    if ranks.rank == 0:
        _point_at(target)
    ranks.barrier()
    return target


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


def _abandon(staging: Path, ranks: Ranks) -> None:
    """Free the disk space of a failed save. What can't be removed is cleared at the next start."""
    if ranks.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)


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
