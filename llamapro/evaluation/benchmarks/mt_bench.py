"""MT-Bench (L. Zheng et al., 2023): conversations of two turns, judged by whom the user chooses.

The model answers both turns through its own chat template; what it says first is part of what it is asked next. The
answers are written as JSON lines in the form of FastChat's `model_answer`, so that its own judge can read them, each
with prompts for any other judge beside it. What a judge says comes back as JSON lines, in the form of FastChat's
`model_judgment` or as the judge's own words with the rating in double brackets. Nothing is sent anywhere.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets  # type: ignore[import-untyped]
import orjson

from llamapro.errors import DataError, UserError
from llamapro.evaluation.intervals import Estimate, ratio_of_sums
from llamapro.evaluation.stored import Key, Stored

HUB_QUESTIONS = "HuggingFaceH4/mt_bench_prompts"
TURNS = 2
LONGEST_ANSWER = 1024
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; else the likeliest
RATINGS = (1.0, 10.0)
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
JUDGE = (
    "You judge the answers of an assistant. Say shortly how helpful, relevant, accurate, deep and clear the "
    "assistant's last answer is, whatever its length, and where there is a reference whether it agrees with it. Then "
    "rate that answer from 1 to 10, strictly in this form: [[rating]], for example: Rating: [[5]]."
)

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """Two questions, the second about the answer to the first; `reference` holds an answer to each, or nothing."""

    number: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]


class MtBenchKey(Key):
    """What fixes a model's answers."""

    model_digest: str
    words_digest: str
    questions: str
    precision: str
    device: str
    program: str


class Rated(Stored):
    """Mean rating with its 95 % half width over questions."""

    rating: float
    half_width: float | None
    answers: int


class MtBenchResults(Stored):
    """The whole of mt_bench.json: `turns` by turn, `categories` by kind of question, `overall` over all answers."""

    model_name: str
    questions: str
    judgements: str
    overall: Rated
    turns: dict[str, Rated]
    categories: dict[str, Rated]


class Ask(Protocol):
    """Answers generation requests (prompt, settings), in their order."""

    def __call__(self, kind: str, requests: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers."""


class Template(Protocol):
    """A conversation as the model's chat template writes it, up to where the assistant begins."""

    def __call__(self, messages: list[Message]) -> str:
        """The prompt."""


def read_questions(given: str) -> list[Question]:
    """The questions of a JSON lines file in FastChat's form, or those of the hub for "hub".

    Raises:
        UserError: the hub, or the file, can't be read.
        DataError: a line is no question of two turns; names it.
    """
    if given == "hub":
        return [_question(row, f"{HUB_QUESTIONS}, row {number}") for number, row in enumerate(_hub_rows(), 1)]
    return [_question(row, place) for place, row in _lines(Path(given), "--mt-bench")]


def questions_digest(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked."""
    content = [[one.number, one.category, *one.turns] for one in questions]
    return hashlib.sha256(orjson.dumps(content)).hexdigest()


def converse(questions: Sequence[Question], ask: Ask, template: Template) -> list[list[str]]:
    """The model's answers to every turn of every question."""
    conversations: list[list[Message]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(TURNS):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        requests = [
            [template(conversation), _settings(question.category)]
            for question, conversation in zip(questions, conversations, strict=True)
        ]
        for place, answer in enumerate(ask("generate_until", requests)):
            answers[place].append(answer.strip())
            conversations[place].append({"role": "assistant", "content": answer.strip()})
    return answers


def answer_lines(questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str) -> bytes:
    """FastChat's `model_answer` lines, each with a judge's prompt for every turn."""
    lines = []
    for question, given in zip(questions, answers, strict=True):
        line = {
            "question_id": question.number,
            "answer_id": hashlib.sha256(orjson.dumps([model, question.number, given])).hexdigest()[:22],
            "model_id": model,
            "category": question.category,
            "choices": [{"index": 0, "turns": list(given)}],
            "judge": [_judge_prompt(question, given, turn) for turn in range(TURNS)],
        }
        lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def read_ratings(path: Path, questions: Sequence[Question]) -> dict[tuple[int, int], float]:
    """A judge's ratings by question and turn (1, 2).

    Raises:
        UserError: the file can't be read.
        DataError: a line holds no rating from 1 to 10 of a turn of these questions, or one that is rated already, or
            turns are left unrated; names them.
    """
    wanted = {(question.number, turn) for question in questions for turn in range(1, TURNS + 1)}
    found: dict[tuple[int, int], float] = {}
    for place, line in _lines(path, "--mt-bench-judgements"):
        answer = (line.get("question_id"), line.get("turn"))
        if answer not in wanted:
            raise DataError(f"{place}: question {answer[0]!r}, turn {answer[1]!r} is none of those that were asked")
        if answer in found:
            raise DataError(f"{place}: question {answer[0]}, turn {answer[1]} is rated a second time")
        found[answer] = _rating(line, place)
    if missing := sorted(wanted - set(found)):
        raise DataError(
            f"{path}: {len(missing)} of {len(wanted)} answers are not rated, the first (id, turn) {missing[0]}"
        )
    return found


def rated(
    model: str, questions: Sequence[Question], ratings: Mapping[tuple[int, int], float], judgements: str
) -> MtBenchResults:
    """The means. Both turns of a question are one item, for they are not independent."""

    def mean(chosen: Sequence[Question], turns: Sequence[int]) -> Rated:
        sums = [sum(ratings[question.number, turn] for turn in turns) for question in chosen]
        estimate: Estimate = ratio_of_sums(sums, [float(len(turns))] * len(chosen))
        return Rated(rating=estimate.value, half_width=estimate.half_width, answers=len(chosen) * len(turns))

    kinds = dict.fromkeys(question.category for question in questions)
    both = range(1, TURNS + 1)
    return MtBenchResults(
        model_name=model,
        questions=questions_digest(questions),
        judgements=judgements,
        overall=mean(questions, both),
        turns={str(turn): mean(questions, [turn]) for turn in both},
        categories={kind: mean([one for one in questions if one.category == kind], both) for kind in kinds},
    )


def _settings(category: str) -> dict[str, Any]:
    temperature = TEMPERATURES.get(category)
    sampled = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    return {"until": [], "max_gen_toks": LONGEST_ANSWER, **sampled}


def _judge_prompt(question: Question, answers: Sequence[str], turn: int) -> list[Message]:
    parts = []
    for number in range(turn + 1):
        parts += [f"### User\n{question.turns[number]}"]
        if number < len(question.reference):
            parts += [f"### Reference answer\n{question.reference[number]}"]
        parts += [f"### Assistant\n{answers[number]}"]
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": "\n\n".join(parts)}]


def _rating(line: Mapping[str, Any], place: str) -> float:
    said = RATING.findall(str(line.get("judgment", line.get("judgement", ""))))
    score = line.get("score", said[-1] if said else None)
    try:
        rating = float(score)
    except (TypeError, ValueError):
        rating = float("nan")
    if not RATINGS[0] <= rating <= RATINGS[1]:
        raise DataError(f"{place}: no rating from 1 to 10, neither as score nor as [[rating]] in judgment: {score!r}")
    return rating


def _question(row: Mapping[str, Any], place: str) -> Question:
    turns = row.get("turns", row.get("prompt"))
    number = row.get("question_id", row.get("prompt_id"))
    if not isinstance(turns, list) or len(turns) != TURNS or not isinstance(number, int):
        raise DataError(f"{place}: no question_id with turns, a list of two questions")
    return Question(number, str(row.get("category", "")), tuple(turns), tuple(row.get("reference") or ()))


def _hub_rows() -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = datasets.load_dataset(HUB_QUESTIONS, split="train").to_list()
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--mt-bench hub: {HUB_QUESTIONS} can't be read from the hub ({error}); give a file of questions instead"
        ) from error
    return rows


def _lines(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{option} {path}: can't be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: no JSON object")
        yield f"{path}, line {number}", row
