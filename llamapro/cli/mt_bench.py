"""`llamapro evaluate --mt-bench …`: two-turn conversations, written down for a judge and read back with its ratings."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llamapro import console
from llamapro.errors import UserError
from llamapro.evaluation.benchmarks.crew import Crew
from llamapro.evaluation.stored import write_stored
from llamapro.files.atomic import write_atomic

if TYPE_CHECKING:
    from llamapro.evaluation.benchmarks.mt_bench import MtBenchResults, Question

ANSWERS_NAME = "mt_bench_answers.jsonl"
RATINGS_NAME = "mt_bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `evaluate` takes for it."""
    parser.add_argument(
        "--mt-bench",
        metavar="hub|FILE",
        help="let the model answer MT-Bench, the hub's questions or those of a JSON lines file; writes "
        f"{ANSWERS_NAME}, with prompts for a judge of your choice",
    )
    parser.add_argument(
        "--mt-bench-judgements", type=Path, metavar="FILE", help=f"the judge's ratings; writes {RATINGS_NAME}"
    )


def questions(arguments: argparse.Namespace) -> "list[Question]":
    """What will be asked; empty where nothing is.

    Raises:
        UserError: there are judgements of nothing, or the questions can't be read.
    """
    if arguments.mt_bench is None:
        if arguments.mt_bench_judgements is not None:
            raise UserError("--mt-bench-judgements rates answers to --mt-bench; give both")
        return []
    from llamapro.evaluation.benchmarks.mt_bench import read_questions

    found = read_questions(arguments.mt_bench)
    if not found:
        raise UserError(f"--mt-bench {arguments.mt_bench}: there is no question in it")
    return found


def evaluate(arguments: argparse.Namespace, crew: Crew, model: tuple[str, Path], asked: "list[Question]") -> None:
    """Let the model answer, write its answers, and its ratings where a judge has given them."""
    from llamapro.evaluation.benchmarks.mt_bench import answer_lines, rated, read_ratings
    from llamapro.evaluation.benchmarks.talk import Talk, talk

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = talk(Talk(crew, arguments.precision, device, arguments.output), model[1], model[0], asked)
    write_atomic(arguments.output / ANSWERS_NAME, answer_lines(asked, answers, model[0]))
    console.info(f"wrote {arguments.output / ANSWERS_NAME}")
    if arguments.mt_bench_judgements is None:
        return
    judgements = arguments.mt_bench_judgements
    results = rated(model[0], asked, read_ratings(judgements, asked), str(judgements))
    write_stored(arguments.output / RATINGS_NAME, results)
    _show(results)
    console.info(f"wrote {arguments.output / RATINGS_NAME}")


def _show(results: "MtBenchResults") -> None:
    lines = {"all": results.overall}
    lines |= {f"turn {turn}": found for turn, found in results.turns.items()} | results.categories
    rows = [
        (
            name,
            f"{found.rating:.2f}" + ("" if found.half_width is None else f" ± {found.half_width:.2f}"),
            str(found.answers),
        )
        for name, found in lines.items()
    ]
    console.table(
        f"{results.model_name}: ratings from 1 to 10, intervals 95 %", ("MT-Bench", "rating", "answers"), rows
    )
