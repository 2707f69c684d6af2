"""Work that may fail on one rank alone, such as a flipped byte in its share of the base, agreed on by all ranks.

Every rank ends with the same message, instead of one that fails and others that wait for it.
"""

from collections.abc import Callable
from typing import TypeVar

from llamapro.errors import CheckFailed, LlamaproError, UserError
from llamapro.ranks import Ranks

T = TypeVar("T")


def agree(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do work that may fail on one rank alone; if it fails on any, every rank raises the same error.

    Raises:
        UserError: on every rank, when the first failing rank met one.
        CheckFailed: on every rank, for any other error of ours.
    """
    value, failure = _attempt(work)
    report = (str(failure), failure.exit_code) if failure else None
    reports = [entry for entry in ranks.all_gather_json(report) if entry is not None]
    if reports:
        message, exit_code = reports[0]
        kind = UserError if exit_code == UserError.exit_code else CheckFailed
        raise kind(message) from failure
    return value  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, LlamaproError | None]:
    try:
        return work(), None
    except LlamaproError as error:
        return None, error
