"""Student's t agrees with the reference library from two rows to a million."""

import pytest
from scipy.stats import t

from llamapro.evaluation.student import standard_errors_975


@pytest.mark.parametrize("rows", [*range(2, 60), 100, 499, 500, 501, 502, 503, 1000, 1_000_000])
def test_it_is_the_quantile_of_the_reference_library(rows: int) -> None:
    assert standard_errors_975(rows) == pytest.approx(t.ppf(0.975, rows - 1), rel=1e-7)


def test_one_row_has_none() -> None:
    with pytest.raises(ValueError, match="1 rows"):
        standard_errors_975(1)
