"""Texts as commands take them: NAME=DATASET[:SPLIT], in rows of a length that the model can read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llamapro.config.yaml_file import read_yaml
from llamapro.data.dataset import Dataset
from llamapro.data.shard import SplitName
from llamapro.errors import UserError
from llamapro.evaluation.measure import TextSet
from llamapro.expansion.source import read_config
from llamapro.export.source import is_trained_source
from llamapro.run_folder import RunFolder
from llamapro.training.tokenizer import model_tokenizer_identity

DEFAULT_SPLIT: SplitName = "heldout"
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
DEFAULT_SEQUENCES = 256
DEFAULT_SEQUENCE_LENGTH = 2048


def parse_text(text: str, option: str = "--text") -> TextSet:
    """A text as the user names it.

    Raises:
        UserError: the words can't be understood, or name no dataset.
    """
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UserError(f"{option} {text!r}: write NAME=DATASET or NAME=DATASET:SPLIT, e.g. law=data/law")
    for split in SPLITS:
        if place.endswith(f":{split}"):
            return open_text(name, place.removesuffix(f":{split}"), split)
    return open_text(name, place, DEFAULT_SPLIT)


def open_text(name: str, given: str, split: SplitName) -> TextSet:
    """A split of a dataset folder."""
    return TextSet(name, given, Dataset.open(Path(given)), split)


def require_names_once(sets: Sequence[TextSet], option: str = "--text") -> None:
    """Raises:
    UserError: two texts have the same name.
    """
    names = [text.name for text in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{option}: {sorted(twice)[0]!r} is used for two texts; give each its own name")


def require_tokenizer(sets: Sequence[TextSet], folder: Path) -> None:
    """Raises:
    UserError: a text was made with another tokenizer than the model in the folder has.
    """
    identity = model_tokenizer_identity(folder)
    for text in sets:
        text.dataset.require_tokenizer(identity, str(folder))


def row_length(given: int | None, config: Mapping[str, Any], folder: Path) -> int:
    """Tokens of a row: as given, or the run's, or the default, and no more than the model has positions.

    Args:
        config: of a run; empty without one.
    """
    positions = read_config(folder).get("max_position_embeddings")
    limit = positions if isinstance(positions, int) else None
    if given is not None and limit is not None and given > limit:
        raise UserError(f"--sequence-length {given}: the model has {limit} positions (max_position_embeddings)")
    wanted = given or config.get("data", {}).get("sequence_length") or DEFAULT_SEQUENCE_LENGTH
    return min(int(wanted), limit) if limit is not None else int(wanted)


def run_configuration(place: Path) -> Mapping[str, Any]:
    """config.yaml of a run, or of the run that a checkpoint lies in; empty for anything else."""
    for folder in (place, place.absolute().parent.parent):
        if is_trained_source(place) and RunFolder(folder).config_file.is_file():
            return read_yaml(RunFolder(folder).config_file).values
    return {}
