"""Which checkpoint a run continues from: the newest whose every byte agrees with its manifest. Also: list, prune.

Rank 0 decides and every rank hears the same answer. Invalid checkpoints are renamed, never deleted. A run that has
checkpoints but no valid one is refused, because starting afresh would bury its work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamapro import console
from llamapro.checkpoint.folder import Checkpoint, check_digest, open_checkpoint, read_checked_manifest, read_checkpoint
from llamapro.checkpoint.layout import QUARANTINE, parse_folder_name, pointer_path, pointer_text, read_pointer
from llamapro.config.root import RunConfig
from llamapro.errors import Corrupted, UserError
from llamapro.files.atomic import STAGING, TRASH, fsync_folder, remove_leftovers, remove_tree, write_atomic
from llamapro.ranks import Ranks


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder as `list_checkpoints` found it.

    Attributes:
        step: from its name.
        nbytes: of all its files.
        problem: what is wrong with it; empty when nothing is.
    """

    folder: Path
    step: int
    nbytes: int
    problem: str


def find_checkpoint(root: Path, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to continue from, the same on every rank; None when the run has none yet.

    Clears what killed saves left behind, quarantines invalid checkpoints that are newer than the valid one, and points
    RUN/latest at the valid one. Only one job may work on a run folder.

    Args:
        root: the run's checkpoints folder; it need not exist.

    Raises:
        Corrupted: there are checkpoints, but none is valid; or there are none any more.
        UserError: the folder can't be read.
    """
    names, quarantined, pointed = _candidates(root, ranks)
    problems: dict[str, str] = {}
    for name in names:
        checkpoint, problem = _check_together(root.absolute() / name, ranks)
        if checkpoint is not None:
            if ranks.rank == 0:
                _settle(root, checkpoint.folder, problems)
            ranks.barrier()
            return checkpoint
        problems[name] = problem
    if problems or quarantined:
        raise Corrupted(_refusal(root, problems, quarantined))
    if pointed:
        raise Corrupted(
            f"{pointer_path(root)} says {pointed}, so the run has had checkpoints, but {root} has none; bring them "
            f"back, or move {pointer_path(root)} away to start afresh"
        )
    return None


def list_checkpoints(root: Path, *, digests: bool) -> list[Listed]:
    """Every checkpoint folder, newest first, checked by sizes and, if asked, by digests (reads every byte)."""
    return [_examine(folder, digests=digests) for folder in _newest_first(root)]


def prune(
    root: Path,
    keep: int,
    keep_every_steps: int | None,
    keep_newest_of_every_steps: int | None = None,
    *,
    digests: bool = False,
) -> list[Path]:
    """Delete old checkpoints; to be called by one process. Never raises: what can't be deleted is warned about.

    The `keep` newest complete ones stay, and every one whose step is a multiple of `keep_every_steps`, and the newest
    one whose step is a multiple of `keep_newest_of_every_steps`, and the one RUN/latest names. Incomplete and
    quarantined folders are left alone. Complete is meant by sizes, as digests would read all of them at every save, or
    if asked by digests. Deletion begins with a rename.

    Returns:
        What was deleted.
    """
    assert keep >= 1, f"keep is {keep}"
    complete = [listed for listed in list_checkpoints(root, digests=digests) if not listed.problem]
    kept_folders = {read_pointer(root), newest_of_every(complete, keep_newest_of_every_steps)}
    deleted = []
    for listed in complete[keep:]:
        kept_for_ever = keep_every_steps is not None and listed.step % keep_every_steps == 0
        if kept_for_ever or listed.folder in kept_folders:
            continue
        try:
            remove_tree(listed.folder)
            deleted.append(listed.folder)
        except OSError as error:
            console.warning(f"{listed.folder} could not be deleted: {error}")
    return deleted


def scheduled_steps(config: RunConfig) -> int | None:
    """Of the checkpoints that a run may roll back to: it goes back to the newest whose step is a multiple of this.

    None for a run that never goes back.
    """
    return config.checkpoint.every_steps if config.guards.spike == "rollback" else None


def set_aside(root: Path) -> list[Path]:
    """The folders that failed their check at some start of the run."""
    return sorted(folder for folder in _folders(root) if folder.name.startswith(QUARANTINE))


def newest_of_every(listed: Sequence[Listed], steps: int | None) -> Path | None:
    """The first of complete checkpoints, newest first, whose step is a multiple of `steps`; None: there is none."""
    return next((one.folder for one in listed if steps is not None and one.step % steps == 0), None)


def _candidates(root: Path, ranks: Ranks) -> tuple[list[str], list[str], str]:
    """What rank 0 sees after cleaning up: names of checkpoint folders, newest first, of quarantined ones, and where
    there are none what the pointer says: it is written only after a checkpoint.
    """
    names: list[str] = []
    quarantined: list[str] = []
    pointed = problem = ""
    if ranks.rank == 0:
        try:
            _clear_leftovers(root)
            names = [folder.name for folder in _newest_first(root)]
            quarantined = [folder.name for folder in set_aside(root)]
            pointed = "" if names or quarantined else pointer_text(root)
        except OSError as error:
            problem = str(error)
    names, quarantined, pointed, problem = ranks.broadcast_json([names, quarantined, pointed, problem])
    if problem:
        raise UserError(f"{root} can't be searched for checkpoints: {problem}; check run.folder and its permissions")
    return names, quarantined, pointed


def _newest_first(root: Path) -> Iterator[Path]:
    """Checkpoint folders by step, then revision; clocks do not matter."""
    found = [(parsed, folder) for folder in _folders(root) if (parsed := parse_folder_name(folder.name))]
    return (folder for _, folder in sorted(found, reverse=True))


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _examine(folder: Path, *, digests: bool) -> Listed:
    parsed = parse_folder_name(folder.name)
    assert parsed is not None
    nbytes = 0
    try:
        nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if digests:
            open_checkpoint(folder)
        else:
            read_checked_manifest(folder)
    except (Corrupted, OSError) as error:
        return Listed(folder, parsed[0], nbytes, str(error))
    return Listed(folder, parsed[0], nbytes, "")


def _check_together(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, str]:
    """Check one candidate with all ranks, each digesting its share of the files; the same verdict on every rank."""
    checkpoint, problem = None, ""
    try:
        manifest = read_checked_manifest(folder)
        checkpoint = read_checkpoint(folder, manifest)
        for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
            check_digest(folder, manifest, name)
    except Corrupted as error:
        problem = str(error)
    problem = next(filter(None, ranks.all_gather_json(problem)), "")
    return (None if problem else checkpoint), problem


def _settle(root: Path, valid: Path, problems: dict[str, str]) -> None:
    """Quarantine the invalid folders that are newer than the valid one, then make the pointer agree."""
    for name, problem in problems.items():
        try:
            place = _quarantine(root / name)
            console.warning(f"{problem}; renamed to {place}, continuing from {valid.name}")
        except OSError as error:
            console.warning(f"{problem}; continuing from {valid.name}, renaming it failed: {error}")
    if read_pointer(root) != root / valid.name:
        try:
            write_atomic(pointer_path(root), f"{valid.name}\n")
        except OSError as error:
            console.warning(f"{pointer_path(root)} could not be pointed at {valid.name}: {error}")


def _quarantine(folder: Path) -> Path:
    place = folder.with_name(f"{QUARANTINE}{folder.name}")
    count = 1
    while place.exists():
        count += 1
        place = folder.with_name(f"{QUARANTINE}{folder.name}.{count}")
    folder.rename(place)
    fsync_folder(place.parent)
    return place


def _refusal(root: Path, problems: dict[str, str], quarantined: list[str]) -> str:
    lines = [f"{root} has checkpoints, but no valid one; the run is not started afresh over them:"]
    lines += [f"  - {problem}" for problem in problems.values()]
    lines += [f"  - {name} was set aside before" for name in quarantined]
    out = f"restore a valid checkpoint, or move {root} away, and {pointer_path(root)} too, to start afresh"
    return "\n".join([*lines, out])


def _clear_leftovers(root: Path) -> None:
    """Delete staging and trash of killed saves and deletions, in the checkpoints folder and of the pointer."""
    for entry in root.iterdir() if root.is_dir() else ():
        for kind in (STAGING, TRASH):
            name, found, _ = entry.name.removeprefix(".").partition(kind)
            if found and entry.name.startswith("."):
                remove_leftovers(root / name)
    remove_leftovers(pointer_path(root))
