"""pass@k without bias (M. Chen et al., *Evaluating Large Language Models Trained on Code*, 2021, section 2.1).

The share of all ways to draw k of n programs in which at least one passes, when c of the n pass: 1 − C(n−c, k)/C(n, k).
"""

from math import comb


def pass_at_k(programs: int, passed: int, k: int) -> float:
    """The chance that at least one of k programs, drawn without replacement from `programs`, passes."""
    if not 1 <= k <= programs:
        raise ValueError(f"pass@{k} can't be estimated from {programs} programs")
    if not 0 <= passed <= programs:
        raise ValueError(f"{passed} of {programs} programs can't have passed")
    return 1 - comb(programs - passed, k) / comb(programs, k)
