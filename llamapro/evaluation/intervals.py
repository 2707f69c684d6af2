"""Ratios of sums with their 95 % confidence intervals.

Loss per token, bits per byte and relative change are all Σ aᵢ / Σ bᵢ over rows i. Rows (packed windows of held-out
text) are taken as independent; the interval is Student's t with n−1 degrees of freedom times the standard error of the
ratio estimator (W. G. Cochran, *Sampling Techniques*, 3rd ed., ch. 6): √(n/(n−1) · Σ (aᵢ − R·bᵢ)²) / Σ bᵢ. No
randomness, no order dependence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamapro.evaluation.student import standard_errors_975


@dataclass(frozen=True)
class Estimate:
    """A measured value; with 95 % confidence it lies within `value` ± `half_width` (None: one row says nothing)."""

    value: float
    half_width: float | None


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Σ numerators / Σ denominators over rows, with its interval. The sum of the denominators must not be zero."""
    total = math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    rows = len(numerators)
    if rows < 2:
        return Estimate(ratio, None)
    pairs = zip(numerators, denominators, strict=True)
    squares = math.fsum((above - ratio * below) ** 2 for above, below in pairs)
    return Estimate(ratio, standard_errors_975(rows) * math.sqrt(rows / (rows - 1) * squares) / abs(total))
