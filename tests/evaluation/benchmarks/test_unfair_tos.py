"""UNFAIR-ToS: the likeliest choice per token, right if it is among the labels; scored here by transformers alone."""

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from llamapro.cli.benchmarks import _load
from llamapro.evaluation.benchmarks.crew import Crew
from llamapro.evaluation.benchmarks.label_sets import likeliest_is_a_label
from llamapro.evaluation.benchmarks.measure import TaskSettings, evaluate_benchmarks
from llamapro.evaluation.benchmarks.model import LogLikelihood
from llamapro.evaluation.benchmarks.plan import plan_benchmarks
from llamapro.evaluation.benchmarks.suite import Benchmark
from llamapro.evaluation.benchmarks.tasks import Tasks
from llamapro.ranks import Ranks
from tests.support.models import save_tiny_llama
from tests.support.plain_scoring import PlainScoring

NAMES = ("Limitation of liability", "Unilateral termination", "Unilateral change", "Content removal")
NAMES += ("Contract by using", "Choice of law", "Jurisdiction", "Arbitration")
CHOICES = [*(name.lower() for name in NAMES), "nothing"]
LABELS = ([], [0], [2, 6], [], [7, 1], [5], [], [3])


def split(kind: str) -> datasets.Dataset:
    rows = [{"text": f"The {kind} party may do {number}.", "labels": labels} for number, labels in enumerate(LABELS)]
    labels = datasets.Sequence(datasets.ClassLabel(names=list(NAMES)))
    return datasets.Dataset.from_list(rows, features=datasets.Features(text=datasets.Value("string"), labels=labels))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's dataset in small."""

    def load(path: str, name: str, **_: Any) -> datasets.DatasetDict:
        assert (path, name) == ("coastalcph/lex_glue", "unfair_tos")
        return datasets.DatasetDict({kind: split(kind) for kind in ("train", "validation", "test")})

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)


def prompt(kind: str, number: int) -> str:
    return f"Clause of a contract: The {kind} party may do {number}.\nUnfair in it:"


@pytest.mark.usefixtures("hub")
def test_four_solved_clauses_of_the_training_split_come_before_the_clause() -> None:
    task = Tasks(None).build("unfair_tos", Benchmark("unfair_tos"))
    whole = task.fewshot_context(doc=task.eval_docs[3], num_fewshot=task.config.num_fewshot)
    *examples, asked = whole.split("\n\n")
    assert asked == prompt("test", 3)
    solved = {f"{prompt('train', number)} {CHOICES[(labels or [8])[0]]}" for number, labels in enumerate(LABELS)}
    assert len(examples) == len(set(examples)) == 4
    assert set(examples) <= solved


@pytest.mark.usefixtures("hub")
def test_score_is_that_of_the_likeliest_choice_per_token(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", max_positions=1024, seed=2)
    plan = plan_benchmarks(Tasks(None), (), [Benchmark("unfair_tos", 0)], run_programs=False)
    settings = TaskSettings(limit=None, chat=False, precision="keep", device="cpu")
    crew = Crew(Ranks.solo(), partial(_load, 0, 4))
    found = evaluate_benchmarks(crew, plan, ("tiny", model), None, settings, tmp_path).model["unfair_tos"]
    plain = PlainScoring(model)
    right = 0
    for number, labels in enumerate(LABELS):
        context = prompt("test", number)
        given = len(plain.tokenizer(context)["input_ids"])
        rates = [
            plain.log_likelihood(context, f" {choice}")
            / (len(plain.tokenizer(f"{context} {choice}")["input_ids"]) - given)
            for choice in CHOICES
        ]
        right += max(range(9), key=rates.__getitem__) in (labels or [8])
    assert found.items == len(LABELS)
    assert found.metrics["acc,none"].value == pytest.approx(right / len(LABELS))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [([1], 1.0), ([0, 1], 1.0), ([0], 0.0), ([], 0.0)],
)
def test_likelihood_counts_per_token(labels: list[int], wanted: float) -> None:
    """The second is the likeliest per token; the first would be as a whole."""
    answers = [LogLikelihood.of(-4.0, False, 1), LogLikelihood.of(-6.0, False, 4), LogLikelihood.of(-5.0, False, 2)]
    assert likeliest_is_a_label({"labels": labels}, answers) == {"acc": wanted}


def test_clause_without_labels_is_a_fair_one() -> None:
    answers = [LogLikelihood.of(-9.0, False, 1), LogLikelihood.of(-1.0, False, 1)]
    assert likeliest_is_a_label({"labels": []}, answers) == {"acc": 1.0}
