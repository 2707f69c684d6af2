"""MT-Bench: the second question follows the model's own first answer; ratings come back from whoever judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.errors import DataError, UserError
from llamapro.evaluation.benchmarks.mt_bench import (
    Question,
    answer_lines,
    converse,
    rated,
    read_questions,
    read_ratings,
)
from tests.support.models import save_tiny_llama

LINES = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now in verse."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2+3?", "And twice it?"], "reference": ["5", "10"]},
    {"question_id": 121, "category": "math", "turns": ["What is 1+1?", "And half of it?"]},
]


def json_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions(str(json_lines(tmp_path / "questions.jsonl", LINES)))


def echo(kind: str, requests: Sequence[Sequence[Any]]) -> list[str]:
    assert kind == "generate_until"
    return [f" <{prompt}> " for prompt, _ in requests]


def last_words(messages: list[dict[str, str]]) -> str:
    return "|".join(f"{message['role'][0]}:{message['content']}" for message in messages)


def test_second_question_follows_the_first_answer(questions: list[Question]) -> None:
    answers = converse(questions, echo, last_words)
    assert answers[0] == ["<u:Write a line.>", "<u:Write a line.|a:<u:Write a line.>|u:Now in verse.>"]


def test_writing_is_sampled_and_sums_are_not(questions: list[Question]) -> None:
    asked: list[dict[str, Any]] = []

    def note(kind: str, requests: Sequence[Sequence[Any]]) -> list[str]:
        asked.extend(settings for _, settings in requests)
        return echo(kind, requests)

    converse(questions, note, last_words)
    assert [one["do_sample"] for one in asked] == [True, False, False] * 2
    assert asked[0]["temperature"] == 0.7


def test_judge_sees_the_conversation_up_to_the_turn_and_the_references(questions: list[Question]) -> None:
    lines = answer_lines(questions, [["a1", "a2"], ["b1", "b2"], ["c1", "c2"]], "tiny").splitlines()
    found = orjson.loads(lines[1])
    assert (found["question_id"], found["model_id"]) == (111, "tiny")
    assert found["choices"] == [{"index": 0, "turns": ["b1", "b2"]}]
    first, second = (prompt[1]["content"] for prompt in found["judge"])
    assert "What is 2+3?" in first and "### Reference answer\n5" in first and "b1" in first
    assert "b2" not in first and "twice" not in first
    assert second.index("b1") < second.index("And twice it?") < second.index("10") < second.index("b2")


def test_ratings_are_read_as_scores_and_in_the_judges_words(questions: list[Question], tmp_path: Path) -> None:
    scores = {(81, 1): 8, (81, 2): 6, (111, 1): 10, (111, 2): 4, (121, 1): 2, (121, 2): 3}
    rows = [
        {"question_id": number, "turn": turn, **({"score": score} if turn == 1 else words(score))}
        for (number, turn), score in scores.items()
    ]
    path = json_lines(tmp_path / "judged.jsonl", rows)
    found = rated("tiny", questions, read_ratings(path, questions), "judged")
    assert found.overall.rating == pytest.approx(33 / 6)
    assert found.turns["1"].rating == pytest.approx(20 / 3)
    assert found.categories["math"].rating == pytest.approx(19 / 4)
    assert found.categories["writing"].half_width is None
    # By hand: question means 7, 7, 2.5; standard error sqrt(sum of squares / 6); t of the tables for three questions.
    error = ((1.5**2 + 1.5**2 + 3.0**2) / 6) ** 0.5
    assert found.overall.half_width == pytest.approx(4.302653 * error, rel=1e-5)


def words(score: int) -> dict[str, str]:
    return {"judgment": f"As in the example [[5]], I say: Rating: [[{score}]]"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 7, "turn": 1, "score": 3}], "line 1: question 7, turn 1 is none"),
        ([{"question_id": 81, "turn": 1, "score": -1}], "line 1: no rating from 1 to 10.*-1"),
        ([{"question_id": 81, "turn": 1, "judgment": "good"}], "no rating"),
        ([{"question_id": 81, "turn": 1, "score": 3}] * 2, "line 2: .*a second time"),
        ([{"question_id": 81, "turn": 1, "score": 3}], "5 of 6 answers are not rated"),
    ],
)
def test_judgements_that_do_not_fit_are_refused(
    questions: list[Question], tmp_path: Path, rows: list[object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_ratings(json_lines(tmp_path / "judged.jsonl", rows), questions)


def test_questions_that_can_not_be_had_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="line 1: no question_id with turns"):
        read_questions(str(json_lines(tmp_path / "one.jsonl", [{"question_id": 1, "turns": ["only one"]}])))
    with pytest.raises(UserError, match="nothing.jsonl: can't be read"):
        read_questions(str(tmp_path / "nothing.jsonl"))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr("llamapro.evaluation.benchmarks.mt_bench.datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match="couldn't reach the hub.*a file of questions"):
        read_questions("hub")


def test_model_answers_once_and_is_rated_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llamapro.evaluation.benchmarks.mt_bench.LONGEST_ANSWER", 8)
    model = save_tiny_llama(tmp_path / "model", max_positions=1024)
    asked = json_lines(tmp_path / "questions.jsonl", LINES)
    options = ["evaluate", str(model), "--mt-bench", str(asked), "--output", str(tmp_path / "out")]
    assert main(options) == 0
    answers = (tmp_path / "out/mt_bench_answers.jsonl").read_bytes()
    turns = [orjson.loads(line)["choices"][0]["turns"] for line in answers.splitlines()]
    assert len(turns) == 3 and all(len(pair) == 2 for pair in turns)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("llamapro.evaluation.benchmarks.model.load_model", never)
    rows = [{"question_id": row["question_id"], "turn": turn, "score": 4} for row in LINES for turn in (1, 2)]
    judged = json_lines(tmp_path / "judged.jsonl", rows)
    assert main([*options, "--mt-bench-judgements", str(judged)]) == 0
    assert (tmp_path / "out/mt_bench_answers.jsonl").read_bytes() == answers
    assert orjson.loads((tmp_path / "out/mt_bench.json").read_bytes())["overall"]["rating"] == 4.0
    assert "turn 2" in capsys.readouterr().out


def test_model_without_a_chat_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    asked = json_lines(tmp_path / "questions.jsonl", LINES)
    assert main(["evaluate", str(model), "--mt-bench", str(asked), "--output", str(tmp_path / "out")]) == 2
    assert "no chat template" in capsys.readouterr().err
