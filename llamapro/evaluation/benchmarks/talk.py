"""A model's answers to MT-Bench, each set once: what is kept is not asked again, an interrupted one goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from transformers import AutoTokenizer

from llamapro import console
from llamapro.errors import UserError
from llamapro.evaluation.benchmarks.crew import Arguments, Crew, KeptAnswers
from llamapro.evaluation.benchmarks.measure import ANSWERS, benchmark_versions, remove_answers
from llamapro.evaluation.benchmarks.mt_bench import TURNS, MtBenchKey, Question, converse, questions_digest
from llamapro.evaluation.measure import compute_dtype
from llamapro.evaluation.model_digest import model_digest, words_digest
from llamapro.evaluation.results import MEASUREMENTS
from llamapro.files.atomic import write_atomic


@dataclass(frozen=True)
class Talk:
    """Where and how a model is asked."""

    crew: Crew
    precision: str
    device: str
    output: Path


def talk(with_: Talk, folder: Path, name: str, questions: Sequence[Question]) -> list[list[str]]:
    """A model's answers to both turns of every question.

    Args:
        name: how to call the model.

    Raises:
        UserError: its tokenizer has no chat template.
    """
    dtype = compute_dtype(folder, with_.precision)
    key = MtBenchKey(
        model_digest=model_digest(folder),
        words_digest=words_digest(folder),
        questions=questions_digest(questions),
        precision=dtype,
        device=with_.device,
        program=" ".join(f"{name} {number}" for name, number in benchmark_versions().items()),
    )
    file = with_.output / MEASUREMENTS / f"{key.digest()}.json"
    kept = _kept(file, key)
    if kept is not None:
        return kept
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"--mt-bench: {name} has no chat template, so it can't be talked with; evaluate an instruct model"
        )
    with_.crew.load(folder, dtype)
    chunks = with_.output / ANSWERS / key.digest()

    def template(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    with console.progress(f"MT-Bench with {name}", TURNS * len(questions), "answers") as advance:

        def ask(kind: str, requests: Sequence[Arguments]) -> list[Any]:
            return KeptAnswers(with_.crew, chunks, key.digest(), advance)(kind, requests)

        answers = converse(questions, ask, template)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, orjson.dumps({"key": key.model_dump(), "answers": answers}))
    remove_answers(chunks)
    return answers


def _kept(file: Path, key: MtBenchKey) -> list[list[str]] | None:
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    answers: list[list[str]] | None = content.get("answers") if content.get("key") == key.model_dump() else None
    return answers
