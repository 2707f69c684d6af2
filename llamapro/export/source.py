"""Which trained weights an export takes, and the model folder they were trained in."""

from dataclasses import dataclass
from pathlib import Path

from llamapro.checkpoint.discover import list_checkpoints
from llamapro.checkpoint.folder import Checkpoint, open_checkpoint
from llamapro.checkpoint.layout import parse_folder_name
from llamapro.config.yaml_file import read_yaml
from llamapro.errors import CheckFailed, UserError
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.export.delta import DELTA_NAME
from llamapro.files.manifest import MANIFEST_NAME
from llamapro.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedSource:
    """A checked checkpoint with the model folder that its run trained.

    Attributes:
        record: of the model folder; None for a model that was never expanded.
        run: the run folder, or None when the checkpoint lies outside one.
    """

    checkpoint: Checkpoint
    model: Path
    record: ExpansionRecord | None
    run: Path | None


def is_delta(folder: Path) -> bool:
    """Whether a folder is a delta."""
    return (folder / DELTA_NAME).is_file()


def is_trained_source(folder: Path) -> bool:
    """Whether a folder is a run or a checkpoint, as `find_trained` takes them."""
    return _is_checkpoint(folder) or RunFolder(folder).checkpoints.is_dir()


def find_trained(source: Path, model: Path | None) -> TrainedSource:
    """The checkpoint of a run (its newest) or the checkpoint given, checked, with its model folder.

    Args:
        model: the model folder, where the run's config.yaml does not lead to it.

    Raises:
        UserError: `source` is neither run nor checkpoint, has no checkpoint yet, or the model folder isn't found.
        CheckFailed: checkpoint and model folder don't belong together.
        Corrupted: the checkpoint, or the record, is damaged.
    """
    folder = source if _is_checkpoint(source) else _newest_checkpoint(source)
    checkpoint = open_checkpoint(folder)
    run = folder.absolute().parent.parent
    in_run = RunFolder(run).config_file.is_file()
    place = model or _configured_model(run if in_run else None, source)
    if not place.is_dir():
        raise UserError(f"the model folder {place} does not exist; pass the one that was trained as --model")
    record = read_record(place)
    recorded, found = checkpoint.state.record_digest, record.digest() if record else None
    if recorded != found:
        raise CheckFailed(
            f"{folder} was trained on a model with the record {_short(recorded)}, but {place} has {_short(found)}; "
            "pass the folder that was trained as --model"
        )
    return TrainedSource(checkpoint, place, record, run if in_run else None)


def _is_checkpoint(folder: Path) -> bool:
    return parse_folder_name(folder.name) is not None and (folder / MANIFEST_NAME).is_file()


def _newest_checkpoint(run: Path) -> Path:
    root = RunFolder(run).checkpoints
    if not root.is_dir():
        raise UserError(f"{run} is neither a run folder (no {root.name}/), nor a checkpoint, nor a delta")
    listed = list_checkpoints(root, digests=False)
    if not listed:
        raise UserError(f"{root} holds no checkpoint yet; let the run save one (checkpoint.every_steps), then export")
    return listed[0].folder


def _configured_model(run: Path | None, source: Path) -> Path:
    if run is None:
        raise UserError(f"{source} lies outside a run folder, so its model is unknown; pass it as --model")
    path = read_yaml(RunFolder(run).config_file).values.get("model", {}).get("path")
    if not isinstance(path, str):
        raise UserError(f"{RunFolder(run).config_file} has no model.path; pass the model folder as --model")
    return Path(path)


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "no record"
