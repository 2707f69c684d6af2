"""How generated programs are scored: named by the task files, called by lm-eval, run in the sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamapro.evaluation.pass_at_k import pass_at_k
from llamapro.evaluation.sandbox.run import Verdict, run_program

RUNS_PROGRAMS = ("humaneval", "humaneval_64", "mbpp", "gsm8k_pot")
SAME_NUMBER = 1e-3


def completed_prompts(answers: Sequence[Sequence[str]], items: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The programs of HumanEval: each prompt with what the model wrote after it."""
    return [[item["prompt"] + answer for answer in given] for given, item in zip(answers, items, strict=True)]


def solution_functions(answers: Sequence[Sequence[str]], items: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The programs of GSM8K: the function whose body the model wrote."""
    del items
    return [[f"def solution():\n{answer}" for answer in given] for given in answers]


def passing(references: Sequence[str], predictions: Sequence[str | list[str]], k: Sequence[int]) -> dict[str, float]:
    """pass@k of one problem: `references` holds its tests, `predictions` its programs."""
    (tests,), (programs,) = references, predictions
    return _pass_rates([f"{program}\n{tests}" for program in _several(programs)], k)


def right_values(references: Sequence[str], predictions: Sequence[str | list[str]]) -> dict[str, float]:
    """pass@1 of one question: `references` holds the number that solution() has to return."""
    (answer,), (programs,) = references, predictions
    wanted = float(answer.strip().replace(",", "").replace("$", ""))
    test = f"assert abs(float(solution()) - {wanted!r}) < {SAME_NUMBER}"
    return _pass_rates([f"{program}\n\n{test}" for program in _several(programs)], [1])


def reference_program(item: Mapping[str, Any]) -> str:
    """What follows a prompt that ends without white space (lm-eval counts white space as part of what follows)."""
    if "canonical_solution" in item:
        prompt, solution = str(item["prompt"]), str(item["canonical_solution"])
        return prompt[len(prompt.rstrip()) :] + solution
    return f"\n{item['code']}"


def target_bits(item: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of the reference program and its UTF-8 bytes, for bits per byte."""
    ((log_likelihood, _),) = results
    return {"bits_per_byte": (log_likelihood, len(reference_program(item).encode()))}


def _pass_rates(programs: Sequence[str], k: Sequence[int]) -> dict[str, float]:
    passed = sum(run_program(program) is Verdict.PASSED for program in programs)
    return {f"pass@{count}": pass_at_k(len(programs), passed, count) for count in k}


def _several(programs: str | list[str]) -> list[str]:
    return [programs] if isinstance(programs, str) else programs
