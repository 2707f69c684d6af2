"""A run that is stopped and resumed, and one that is not: everything that must be the same of both."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamapro.checkpoint.folder import open_checkpoint
from llamapro.modeling.model import LossOutput
from llamapro.ranks import Ranks
from llamapro.training.loop import train
from llamapro.training.metrics import read_metrics
from llamapro.training.session import Session
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import AskedBefore, losses, open_run, state_digest

IGNORED = -100
CLOCKS = {"tokens_per_second_per_gpu", "memory_gib", "data_wait_fraction", "step_seconds", "time", "seconds", "mfu"}
StepRows = dict[int, list[str]]
"""By step, a digest of each row with target tokens that it was trained on, in the order of the sample stream."""

Groups = list[tuple[float, float, float, tuple[int, ...]]]
"""Learning rate, weight decay, second beta of each parameter group, and the update counts of the partitions."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        numbers: every value of every step's and every validation's line, clocks apart.
        rows: what it was trained on.
        state: digest of weights and moments after the last step; `optimizer_steps`: updates applied.
        groups: hyper-parameters and update counts at the end, on rank 0.
    """

    numbers: list[dict[str, Any]]
    rows: StepRows
    state: str
    optimizer_steps: int
    groups: Groups


def outcome(pool: WorkerPool, values: dict[str, Any], world_size: int, fault: Any = None) -> Outcome:
    """Start or continue a run until its end.

    Args:
        fault: a context manager of no arguments, defined at the top level of a module, around the ranks' whole work.
    """
    answers = pool.run(_train_recorded, values, None, fault, world_size=world_size)
    folder = Path(values["run"]["folder"])
    newest = max((folder / "checkpoints").glob("step-*"))
    return Outcome(
        numbers=without_clocks(read_metrics(folder / "metrics.jsonl")),
        rows=joined_rows([rows for rows, _ in answers]),
        state=state_digest(folder),
        optimizer_steps=open_checkpoint(newest).state.optimizer_steps,
        groups=answers[0][1],
    )


def stop(pool: WorkerPool, values: dict[str, Any], world_size: int, before_step: int) -> None:
    """Start a run, and ask it to stop in the middle of a step's accumulation."""
    try:
        pool.run(_train_recorded, values, before_step, None, world_size=world_size)
    except WorkerError as error:
        assert "RetryLater: the test asks" in str(error), error
    else:
        raise AssertionError("the run was not stopped")


def require_same(found: Outcome, expected: Outcome, first_step: int = 1) -> None:
    """That a resumed run is, bit for bit, the one that was not stopped.

    Args:
        first_step: from which on `found` was trained; its metrics go back to the start of the run.
    """
    assert losses(found.numbers) == losses(expected.numbers)
    assert found.numbers == expected.numbers
    assert found.rows == {step: rows for step, rows in expected.rows.items() if step >= first_step}
    assert found.groups == expected.groups
    assert found.optimizer_steps == expected.optimizer_steps
    assert found.state == expected.state


def without_clocks(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of steps and validations without what depends on the time of day."""
    return [
        {name: value for name, value in line.items() if name not in CLOCKS} for line in metrics if "event" not in line
    ]


def joined_rows(by_rank: list[StepRows]) -> StepRows:
    """The rows of all ranks by step. A rank's share of a step is one piece of the sample stream."""
    return {step: [row for rows in by_rank for row in rows[step]] for step in by_rank[0]}


def _train_recorded(
    ranks: Ranks, values: dict[str, Any], before_step: int | None, fault: Any
) -> tuple[StepRows, Groups]:
    with fault() if fault is not None else nullcontext():
        session, progress = open_run(ranks, values)
        rows = _record_rows(session, progress.step)
        if before_step is not None:
            session = replace(session, stop=AskedBefore(session, before_step))  # type: ignore[arg-type]
        try:
            train(session, progress)
        finally:
            session.metrics.close()
    return rows, _groups(session)


def _record_rows(session: Session, step: int) -> StepRows:
    forward, micro_batches, taken = session.engine.forward_loss, session.facts.accumulation_steps, 0
    rows: StepRows = {}

    def forward_loss(input_ids: torch.Tensor, labels: torch.Tensor, *rest: Any) -> LossOutput:
        nonlocal taken
        if torch.is_grad_enabled():
            found = rows.setdefault(step + taken // micro_batches + 1, [])
            found += [
                _digest(ids) for ids, targets in zip(input_ids, labels, strict=True) if (targets != IGNORED).any()
            ]
            taken += 1
        return forward(input_ids, labels, *rest)

    session.engine.forward_loss = forward_loss  # type: ignore[method-assign]
    return rows


def _digest(ids: torch.Tensor) -> str:
    return sha256(np.ascontiguousarray(ids.numpy()).tobytes()).hexdigest()[:16]


def _groups(session: Session) -> Groups:
    optimizer = session.engine._optimizer
    counts = tuple(sorted({int(state["step"]) for state in optimizer.state.values()}))
    return [(group["lr"], group["weight_decay"], group["betas"][1], counts) for group in optimizer.param_groups]
