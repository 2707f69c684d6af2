"""Programs are scored by running them: reference programs pass, broken ones fail; nothing else counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from llamapro.evaluation.benchmarks.archive import Archive
from llamapro.evaluation.benchmarks.programs import (
    completed_prompts,
    passing,
    reference_program,
    right_values,
    solution_functions,
    target_bits,
)
from tests.support.benchmark_items import GSM8K, HUMANEVAL, MBPP

BROKEN = "    return None\n"


def humaneval_rate(item: Mapping[str, Any], body: str) -> float:
    (programs,) = completed_prompts([[body]], [item])
    return passing([f"{item['test']}\ncheck({item['entry_point']})"], [programs], k=[1])["pass@1"]


def mbpp_rate(item: Mapping[str, Any], program: str) -> float:
    return passing(["\n".join(item["test_list"])], [program], k=[1])["pass@1"]


@pytest.mark.parametrize("item", HUMANEVAL, ids=lambda item: str(item["task_id"]))
def test_completion_passes_if_it_is_right(item: Mapping[str, Any]) -> None:
    assert humaneval_rate(item, item["canonical_solution"]) == 1.0
    assert humaneval_rate(item, BROKEN) == 0.0


@pytest.mark.parametrize("item", MBPP, ids=lambda item: str(item["task_id"]))
def test_program_passes_if_it_is_right(item: Mapping[str, Any]) -> None:
    assert mbpp_rate(item, item["code"]) == 1.0
    assert mbpp_rate(item, "def add(x):\n    return x + 100\n") == 0.0


@pytest.mark.slow
def test_all_reference_programs_of_humaneval_pass_and_all_broken_ones_fail(real_archive: Archive) -> None:
    offline = real_archive.offline("humaneval")
    assert offline is not None
    items = offline.splits(real_archive)["test"]
    assert len(items) == 164
    assert [item["task_id"] for item in items if humaneval_rate(item, item["canonical_solution"]) != 1.0] == []
    assert [item["task_id"] for item in items if humaneval_rate(item, BROKEN) != 0.0] == []


@pytest.mark.slow
def test_archive_has_the_items_it_is_known_for(real_archive: Archive) -> None:
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "gsm8k": 1319, "humaneval": 164, "mbpp": 500}
    for task, count in counts.items():
        offline = real_archive.offline(task)
        assert offline is not None
        assert len(offline.splits(real_archive)["test"]) == count
    for task, count in {"hellaswag": 10042, "piqa": 1838, "winogrande": 1267, "commonsense_qa": 1221}.items():
        offline = real_archive.offline(task)
        assert offline is not None
        assert len(offline.splits(real_archive)["validation"]) == count


def test_pass_at_k_counts_the_programs_of_a_problem() -> None:
    item = HUMANEVAL[1]
    (programs,) = completed_prompts([[item["canonical_solution"], BROKEN, BROKEN, BROKEN]], [item])
    tests = [f"{item['test']}\ncheck({item['entry_point']})"]
    assert passing(tests, [programs], k=[1, 2, 4]) == {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0}


@pytest.mark.parametrize(
    ("answer", "body", "rate"),
    [
        ("18", "    return 16 - 3 + 5\n", 1.0),
        ("18", "    return 18.0\n", 1.0),
        ("1,450", "    return 1450\n", 1.0),
        ("18", "    return '18'\n", 1.0),
        ("18", "    return 17\n", 0.0),
        ("18", "    return None\n", 0.0),
        ("18", "    import os; os._exit(0)\n", 0.0),
        ("18", "    return float('nan')\n", 0.0),
    ],
)
def test_value_of_a_solution_has_to_be_the_answer(answer: str, body: str, rate: float) -> None:
    (programs,) = solution_functions([[body]], GSM8K[:1])
    assert right_values([answer], [programs]) == {"pass@1": rate}


def test_reference_program_takes_the_white_space_before_it() -> None:
    item = {"prompt": 'def f():\n    """Doc."""\n', "canonical_solution": "    return 'ä'\n"}
    whole: Sequence[str] = (item["prompt"].rstrip(), reference_program(item))
    assert "".join(whole) == item["prompt"] + item["canonical_solution"]
    size = len(whole[1].encode())
    assert target_bits(item, [(-2.0, False)]) == {"bits_per_byte": (-2.0, size)}
    assert size == len(whole[1]) + 1
