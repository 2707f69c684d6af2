"""Scores of a sequence of tasks: Overall Performance and Backward Transfer as TRACE defines them.

TRACE (Wang et al. 2023, arXiv 2310.06762), R[t][i] being the score on task i after task t, counted from 1:

    OP_t  = 1/t · Σ_{i=1..t} R[t][i]
    BWT_t = 1/t · Σ_{i=1..t} (R[t][i] − R[i][i])

The last summand of BWT is zero. GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840) divides by t − 1 instead of t, which
makes it t / (t − 1) times as large. Scores must be better when higher; a negative BWT is forgetting.
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def overall_performance(scores: Matrix) -> list[float]:
    """OP_t after each task t.

    Args:
        scores: row t has the score on each task after learning task t; only tasks learned by then count.
    """
    return [sum(row[: t + 1]) / (t + 1) for t, row in enumerate(scores)]


def backward_transfer(scores: Matrix) -> list[float]:
    """BWT_t after each task t; 0 after the first."""
    return [sum(row[i] - scores[i][i] for i in range(t + 1)) / (t + 1) for t, row in enumerate(scores)]
