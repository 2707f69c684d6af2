"""Overall Performance and Backward Transfer against values computed by hand and against numpy."""

import numpy as np
import pytest

from llamapro.evaluation.continual import backward_transfer, overall_performance

# After task 1: 80 on it. After task 2: task 1 fell to 60, task 2 is at 70. After task 3: 50, 75, 90.
SCORES = [[80.0, 10.0, 20.0], [60.0, 70.0, 25.0], [50.0, 75.0, 90.0]]


def test_values_by_hand() -> None:
    assert overall_performance(SCORES) == pytest.approx([80.0, (60 + 70) / 2, (50 + 75 + 90) / 3])
    assert backward_transfer(SCORES) == pytest.approx([0.0, (60 - 80) / 2, (50 - 80 + 75 - 70) / 3])


def test_scores_of_tasks_not_learned_yet_do_not_count() -> None:
    changed = [[row[i] if i <= t else 1e9 for i in range(3)] for t, row in enumerate(SCORES)]
    assert overall_performance(changed) == overall_performance(SCORES)
    assert backward_transfer(changed) == backward_transfer(SCORES)


def test_against_numpy_on_random_scores() -> None:
    scores = np.random.default_rng(3).normal(size=(6, 6))
    last = len(scores)
    assert overall_performance(scores.tolist())[-1] == pytest.approx(scores[-1].mean())
    forgotten = (scores[-1] - scores.diagonal())[:-1].mean()
    assert backward_transfer(scores.tolist())[-1] == pytest.approx(forgotten * (last - 1) / last)
