"""Multiple choice with several right answers, or none, by likelihood per token: named by the task files."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamapro.evaluation.benchmarks.model import LogLikelihood


def likeliest_is_a_label(item: Mapping[str, Any], results: Sequence[LogLikelihood]) -> dict[str, float]:
    """Whether the choice of the highest log-likelihood per token is among the item's labels.

    The last choice stands for an item without labels.
    """
    rates = [result[0] / result.tokens for result in results]
    likeliest = max(range(len(rates)), key=rates.__getitem__)
    right = item["labels"] or [len(results) - 1]
    return {"acc": float(likeliest in right)}
