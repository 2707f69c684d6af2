"""Which benchmarks, with how many shots, and the one number that stands for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from llamapro.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """One line of the table.

    Attributes:
        name: of an lm-eval task, group or tag.
        shots: solved examples before each question; None: as the task says.
        metric: the number that stands for it; None: acc_norm where there is one, else the task's first.
    """

    name: str
    shots: int | None = None
    metric: str | None = None


# The nine columns of the paper's Table 1 (C. Wu et al., *LLaMA Pro*, 2024), as its section 4 describes them.
LLAMA_PRO = (
    Benchmark("arc_challenge", 25, "acc_norm,none"),
    Benchmark("hellaswag", 10, "acc_norm,none"),
    Benchmark("mmlu", 5, "acc,none"),
    Benchmark("truthfulqa_mc2", 0, "acc,none"),
    Benchmark("winogrande", 5, "acc,none"),
    Benchmark("gsm8k", 5, "exact_match,strict-match"),
    Benchmark("humaneval", 0, "pass@1,create_test"),
    Benchmark("mbpp", 3, "pass@1,none"),
    Benchmark("gsm8k_pot", 8, "pass@1,create_test"),
)
SUITES = {"llama-pro": LLAMA_PRO}


def named_benchmarks(tasks: Sequence[str], suite: str | None) -> tuple[Benchmark, ...]:
    """The benchmarks of `--tasks`, besides those of `--suite`.

    Raises:
        UserError: a task is written wrongly, or named twice.
    """
    named = tuple(_parse(text) for text in tasks)
    names = [benchmark.name for benchmark in (*named, *(SUITES[suite] if suite else ()))]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--tasks: {sorted(twice)[0]!r} is named twice" + (f" (suite {suite} has it)" if suite else ""))
    return named


def _parse(text: str) -> Benchmark:
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise UserError(f"--tasks {text!r}: write NAME or NAME:SHOTS, e.g. arc_easy:5")
    return Benchmark(name, int(shots) if colon else None)
