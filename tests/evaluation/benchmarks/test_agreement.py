"""lm-eval's scores through the sharing of requests, against a plain transformers loop with prompts written here."""

import math
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
from scipy.stats import t

from llamapro.cli.benchmarks import _load
from llamapro.evaluation.benchmarks.archive import Archive
from llamapro.evaluation.benchmarks.crew import Crew
from llamapro.evaluation.benchmarks.measure import TaskSettings, evaluate_benchmarks
from llamapro.evaluation.benchmarks.plan import plan_benchmarks
from llamapro.evaluation.benchmarks.store import BenchmarkResults
from llamapro.evaluation.benchmarks.suite import Benchmark
from llamapro.evaluation.benchmarks.tasks import Tasks
from llamapro.ranks import Ranks
from tests.support.benchmark_items import ARC, HELLASWAG, MBPP, PIQA, write_archive
from tests.support.models import save_tiny_llama
from tests.support.plain_scoring import PlainScoring, Question, is_right, is_right_per_character

TASKS = ("arc_easy", "hellaswag", "piqa", "mbpp_bits_per_byte")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), max_positions=1024, seed=3)


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResults:
    root = tmp_path_factory.mktemp("benchmarks")
    tasks = Tasks(Archive(write_archive(root / "items.whl")))
    plan = plan_benchmarks(tasks, (), [Benchmark(name) for name in TASKS], run_programs=False)
    crew = Crew(Ranks.solo(), partial(_load, 0, 3))
    settings = TaskSettings(limit=None, chat=False, precision="keep", device="cpu")
    return evaluate_benchmarks(crew, plan, ("tiny", model), None, settings, root)


def arc_questions() -> list[Question]:
    return [
        Question.of(f"Question: {item['question']}\nAnswer:", item["choices"]["text"], "ABCD".index(item["answerKey"]))
        for item in ARC[4:]
    ]


def hellaswag_questions() -> list[Question]:
    endings = [
        ["sings loudly.", f"bakes {number} of them.", "throws them away.", "sleeps."]
        for number in range(len(HELLASWAG))
    ]
    # The markers in brackets are cut out, and what is left of two spaces is one.
    return [
        Question.of(
            f"Baking. bread: A woman kneads {number} doughs. She",
            [*endings[number][:2], " throws them away.", "sleeps."],
            number % 4,
        )
        for number in range(len(HELLASWAG))
    ]


def piqa_questions() -> list[Question]:
    return [
        Question.of(f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]], item["label"]) for item in PIQA
    ]


@pytest.mark.parametrize(
    ("task", "questions"),
    [("arc_easy", arc_questions()), ("hellaswag", hellaswag_questions()), ("piqa", piqa_questions())],
)
def test_multiple_choice_agrees_with_plain_log_likelihoods(
    results: BenchmarkResults, model: Path, task: str, questions: list[Question]
) -> None:
    found = results.model[task]
    plain = PlainScoring(model)
    likelihoods = [(question, plain.log_likelihoods(question)) for question in questions]
    accuracy = fmean(is_right(*one) for one in likelihoods)
    per_character = fmean(is_right_per_character(*one) for one in likelihoods)
    assert found.items == len(questions)
    assert found.metrics["acc,none"].value == pytest.approx(accuracy)
    assert found.metrics["acc_norm,none"].value == pytest.approx(per_character)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(questions) - 1))
    assert found.metrics["acc,none"].half_width == pytest.approx(t.ppf(0.975, len(questions) - 1) * error, rel=1e-5)


def test_bits_per_byte_of_programs_agree_with_plain_log_likelihoods(results: BenchmarkResults, model: Path) -> None:
    plain = PlainScoring(model)
    total, size = 0.0, 0
    for item in MBPP:
        tests = "\n".join(item["test_list"])
        prompt = (
            f"You are an expert Python programmer, and here is your task: {item['text']} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]"
        )
        total += plain.log_likelihood(prompt, f"\n{item['code']}")
        size += 1 + len(item["code"].encode())
    found = results.model["mbpp_bits_per_byte"]
    assert found.metric == "bits_per_byte,none"
    assert found.metrics[found.metric].value == pytest.approx(-total / math.log(2) / size, rel=1e-5)
    assert not found.metrics[found.metric].higher_is_better
