"""Held-out loss and bits per byte of a model, with confidence intervals, and against its base.

MODEL is a model folder or hub id. A run or a checkpoint is exported into the output folder for the evaluation and
removed again; its validation sets are the default texts. Measurements are kept in the output folder: the same command
again only reads them, an interrupted one continues.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from llamapro import console
from llamapro.config.yaml_file import read_yaml
from llamapro.data.dataset import Dataset
from llamapro.data.shard import SplitName
from llamapro.errors import CheckFailed, UserError
from llamapro.evaluation.compare import evaluate_model
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.results import RESULTS_NAME, Results
from llamapro.expansion.source import read_config, resolve_model
from llamapro.export.export import export
from llamapro.export.source import is_delta, is_trained_source
from llamapro.files.atomic import remove_tree
from llamapro.run_folder import RunFolder
from llamapro.training.tokenizer import model_tokenizer_identity

DEFAULT_SPLIT: SplitName = "heldout"
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
DEFAULT_SEQUENCES = 256
DEFAULT_SEQUENCE_LENGTH = 2048
EXPORTED = ".exported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL|RUN|CHECKPOINT", help="model folder, hub id, run or checkpoint")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=DATASET[:SPLIT]",
        help="text to measure on: a dataset folder, its split heldout (default) or train; may be given several times",
    )
    parser.add_argument(
        "--sequences", type=_count, default=DEFAULT_SEQUENCES, help=f"rows per text at most ({DEFAULT_SEQUENCES})"
    )
    parser.add_argument(
        "--sequence-length",
        type=_count,
        help=f"tokens of a row (default: the run's, else {DEFAULT_SEQUENCE_LENGTH}, or the model's positions if fewer)",
    )
    parser.add_argument(
        "--precision",
        choices=("keep", "bf16", "float32"),
        default="keep",
        help="dtype to compute in (default: the folder's)",
    )
    parser.add_argument("--compare", metavar="BASE", help="model folder or hub id to measure on the same rows")
    parser.add_argument(
        "--fail-if-drop",
        type=float,
        metavar="X",
        help="exit with 1 when the loss on any text is more than this fraction above the base's, e.g. 0.01",
    )
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {RESULTS_NAME} and what is kept")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, write results.json, judge."""
    if arguments.fail_if_drop is not None and arguments.compare is None:
        raise UserError("--fail-if-drop compares with a base; name it with --compare")
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = _run_configuration(Path(arguments.model))
    sets = _text_sets(arguments.text, config, arguments.model)
    base = (arguments.compare, resolve_model(arguments.compare)) if arguments.compare else None
    with _model_folder(arguments.model, arguments.output) as folder:
        for place in [folder, *([base[1]] if base else [])]:
            _require_tokenizer(sets, place)
        settings = Settings(
            sequence_length=_sequence_length(arguments.sequence_length, config, folder),
            sequences=arguments.sequences,
            precision=arguments.precision,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        results = evaluate_model((arguments.model, folder), base, sets, settings, arguments.output)
    _show(results)
    console.info(f"wrote {arguments.output / RESULTS_NAME}")
    _judge(results, arguments.fail_if_drop)
    return 0


@contextmanager
def _model_folder(model: str, output: Path) -> Iterator[Path]:
    """The model's folder; a run or checkpoint becomes one for as long as it is needed."""
    place = Path(model)
    if is_delta(place):
        raise UserError(f"{model} is a delta; rebuild it first: llamapro export {model} OUT --base BASE")
    if not is_trained_source(place):
        yield resolve_model(model)
        return
    target = output / EXPORTED
    export(place, target, overwrite=True)
    try:
        yield target
    finally:
        remove_tree(target)


def _run_configuration(place: Path) -> Mapping[str, Any]:
    """config.yaml of a run, or of the run that a checkpoint lies in; empty for anything else."""
    for folder in (place, place.absolute().parent.parent):
        if is_trained_source(place) and RunFolder(folder).config_file.is_file():
            return read_yaml(RunFolder(folder).config_file).values
    return {}


def _text_sets(given: Sequence[str], config: Mapping[str, Any], model: str) -> list[TextSet]:
    if given:
        sets = [_parse_text(text) for text in given]
    else:
        sets = [_open_text(name, str(path), DEFAULT_SPLIT) for name, path in _validation_sets(config).items()]
        sets = [text for text in sets if text.dataset.split(DEFAULT_SPLIT).tokens]
    if not sets:
        raise UserError(f"{model}: nothing to measure on; name texts with --text NAME=DATASET")
    names = [text.name for text in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--text: {sorted(twice)[0]!r} is used for two texts; give each its own name")
    return sets


def _validation_sets(config: Mapping[str, Any]) -> dict[str, Any]:
    named = config.get("validation", {}).get("sets", "auto")
    if isinstance(named, Mapping) and named:
        return dict(named)
    return {name: source["path"] for name, source in config.get("data", {}).get("sources", {}).items()}


def _parse_text(text: str) -> TextSet:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UserError(f"--text {text!r}: write NAME=DATASET or NAME=DATASET:SPLIT, e.g. law=data/law")
    for split in SPLITS:
        if place.endswith(f":{split}"):
            return _open_text(name, place.removesuffix(f":{split}"), split)
    return _open_text(name, place, DEFAULT_SPLIT)


def _open_text(name: str, given: str, split: SplitName) -> TextSet:
    return TextSet(name, given, Dataset.open(Path(given)), split)


def _require_tokenizer(sets: Sequence[TextSet], folder: Path) -> None:
    identity = model_tokenizer_identity(folder)
    for text in sets:
        text.dataset.require_tokenizer(identity, str(folder))


def _sequence_length(given: int | None, config: Mapping[str, Any], folder: Path) -> int:
    positions = read_config(folder).get("max_position_embeddings")
    limit = positions if isinstance(positions, int) else None
    if given is not None and limit is not None and given > limit:
        raise UserError(f"--sequence-length {given}: the model has {limit} positions (max_position_embeddings)")
    wanted = given or config.get("data", {}).get("sequence_length") or DEFAULT_SEQUENCE_LENGTH
    return min(int(wanted), limit) if limit is not None else int(wanted)


def _show(results: Results) -> None:
    if results.base is None:
        rows = [
            (
                name,
                f"{score.loss:.4f}",
                _interval(score.bits_per_byte, score.bits_per_byte_half_width),
                f"{score.tokens:,}",
            )
            for name, score in results.model.sets.items()
        ]
        title = f"{results.model.name}: lower is better, intervals 95 %"
        console.table(title, ("text", "loss, nats/token", "bits/byte", "tokens"), rows)
        return
    compared = [
        (
            name,
            f"{results.base.sets[name].bits_per_byte:.4f}",
            f"{score.bits_per_byte:.4f}",
            _interval(100 * results.changes[name].fraction, _percent(results.changes[name].half_width), "+.2f") + " %",
            f"{results.base.sets[name].loss:.4f} → {score.loss:.4f}",
        )
        for name, score in results.model.sets.items()
    ]
    title = f"{results.model.name} against {results.base.name}: lower is better, intervals 95 %"
    columns = ("text", "base, bits/byte", "model, bits/byte", "change", "loss, nats/token")
    console.table(title, columns, compared)


def _interval(value: float, half_width: float | None, form: str = ".4f") -> str:
    return f"{value:{form}}" + ("" if half_width is None else f" ± {half_width:{form.removeprefix('+')}}")


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _judge(results: Results, limit: float | None) -> None:
    if limit is None:
        return
    worse = [f"{name} by {change.fraction:+.2%}" for name, change in results.changes.items() if change.fraction > limit]
    if worse:
        raise CheckFailed(f"worse than the base by more than {limit:.2%}: {', '.join(worse)}")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of things; give 1 or more")
    return value
