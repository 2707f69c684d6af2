"""Held-out loss and bits per byte of a model, with confidence intervals, and against its base.

MODEL is a model folder or hub id. A run or a checkpoint is exported into the output folder for the evaluation and
removed again; its validation sets are the default texts. Measurements are kept in the output folder: the same command
again only reads them, an interrupted one continues. --strengths shows what the new blocks gain and cost at strengths
between none and all of what training made of them.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llamapro import console
from llamapro.cli import benchmarks, mt_bench, strengths
from llamapro.cli.details import show_details
from llamapro.cli.texts import (
    DEFAULT_SEQUENCE_LENGTH,
    DEFAULT_SEQUENCES,
    DEFAULT_SPLIT,
    open_text,
    parse_text,
    require_names_once,
    require_tokenizer,
    row_length,
    run_configuration,
)
from llamapro.errors import CheckFailed, UserError
from llamapro.evaluation.benchmarks.crew import Crew
from llamapro.evaluation.compare import evaluate_model
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.results import RESULTS_NAME, Results
from llamapro.evaluation.verdict import Drop, Judgement
from llamapro.expansion.source import resolve_model
from llamapro.export.export import export
from llamapro.export.source import is_delta, is_trained_source
from llamapro.files.atomic import remove_tree
from llamapro.report.evaluation import write_evaluation_page

DETAIL_SEQUENCES = 16
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
        help="exit with 1 when the model is worse than the base by more than this fraction of the base's value (a "
        "text's loss, a benchmark's number) and 95 %% confidence shows that it is worse, e.g. 0.01",
    )
    parser.add_argument(
        "--detail-sequences",
        type=_count_or_none,
        default=DETAIL_SEQUENCES,
        help="for --compare: rows per text at most for token shift and for the contribution of each added block, which "
        f"takes a pass over them for each block ({DETAIL_SEQUENCES}); 0: without both",
    )
    strengths.add_arguments(parser)
    benchmarks.add_arguments(parser)
    mt_bench.add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {RESULTS_NAME} and what is kept")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, write results.json, judge."""
    benchmarks.check_arguments(arguments)
    with benchmarks.at_work(arguments) as crew:
        return 0 if crew is None else _evaluate(arguments, crew)


def _evaluate(arguments: argparse.Namespace, crew: Crew) -> int:
    if arguments.fail_if_drop is not None and arguments.compare is None:
        raise UserError("--fail-if-drop compares with a base; name it with --compare")
    strengths.check_arguments(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = run_configuration(Path(arguments.model))
    asked = mt_bench.questions(arguments)
    required = arguments.strengths is not None or not (benchmarks.are_wanted(arguments) or asked)
    sets = _text_sets(arguments.text, config, arguments.model, required=required)
    planned = benchmarks.plan(arguments)
    base = (arguments.compare, resolve_model(arguments.compare)) if arguments.compare else None
    with _model_folder(arguments.model, arguments.output) as folder:
        drops: list[Drop] = []
        if planned is not None:
            drops += benchmarks.drops(benchmarks.evaluate(arguments, crew, planned, (arguments.model, folder), base))
        if asked:
            mt_bench.evaluate(arguments, crew, (arguments.model, folder), asked)
        if sets:
            drops += text_drops(_evaluate_texts(arguments, crew, folder, base, sets, config))
    console.info(f"wrote {write_evaluation_page(arguments.output, arguments.model)}")
    _judge(drops, arguments.fail_if_drop)
    return 0


def _evaluate_texts(
    arguments: argparse.Namespace,
    crew: Crew,
    folder: Path,
    base: tuple[str, Path] | None,
    sets: Sequence[TextSet],
    config: Mapping[str, Any],
) -> Results:
    for place in [folder, *([base[1]] if base else [])]:
        require_tokenizer(sets, place)
    settings = Settings(
        sequence_length=row_length(arguments.sequence_length, config, folder),
        sequences=arguments.sequences,
        precision=arguments.precision,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    dialled = strengths.dialled_model(arguments, folder, sets, settings)
    results = evaluate_model(
        (arguments.model, folder), base, sets, settings, arguments.output, arguments.detail_sequences, crew.text_scorer
    )
    _show(results)
    show_details(results)
    if dialled is not None:
        strengths.evaluate_strengths(arguments, dialled, sets)
    console.info(f"wrote {arguments.output / RESULTS_NAME}")
    return results


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


def _text_sets(given: Sequence[str], config: Mapping[str, Any], model: str, *, required: bool) -> list[TextSet]:
    if given:
        sets = [parse_text(text) for text in given]
    else:
        sets = [open_text(name, str(path), DEFAULT_SPLIT) for name, path in _validation_sets(config).items()]
        sets = [text for text in sets if text.dataset.split(DEFAULT_SPLIT).tokens]
    if not sets and required:
        raise UserError(
            f"{model}: nothing to measure on; name texts with --text NAME=DATASET, or benchmarks with --tasks"
        )
    require_names_once(sets)
    return sets


def _validation_sets(config: Mapping[str, Any]) -> dict[str, Any]:
    named = config.get("validation", {}).get("sets", "auto")
    if isinstance(named, Mapping) and named:
        return dict(named)
    return {name: source["path"] for name, source in config.get("data", {}).get("sources", {}).items()}


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
            results.verdicts[name],
            f"{results.base.sets[name].loss:.4f} → {score.loss:.4f}",
        )
        for name, score in results.model.sets.items()
    ]
    title = f"{results.model.name} against {results.base.name}: lower is better, intervals 95 %"
    columns = ("text", "base, bits/byte", "model, bits/byte", "change", "verdict", "loss, nats/token")
    console.table(title, columns, compared)


def _interval(value: float, half_width: float | None, form: str = ".4f") -> str:
    return f"{value:{form}}" + ("" if half_width is None else f" ± {half_width:{form.removeprefix('+')}}")


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def text_drops(results: Results) -> list[Drop]:
    """By which fraction the loss on each text is above the base's."""
    return [Drop(name, change.fraction, change.half_width) for name, change in results.changes.items()]


def _judge(drops: Sequence[Drop], limit: float | None) -> None:
    if limit is None:
        return
    judgement = Judgement.of(drops, limit)
    if judgement.open:
        console.warning(
            f"more than {limit:.2%} below the base, though not shown at 95 %: {_listed(judgement.open)}; "
            "measure on more items to know"
        )
    if judgement.shown:
        raise CheckFailed(f"worse than the base by more than {limit:.2%}: {_listed(judgement.shown)}")


def _listed(drops: Sequence[Drop]) -> str:
    return ", ".join(map(str, drops))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of things; give 1 or more")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)
