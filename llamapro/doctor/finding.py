"""One thing that was looked at, and what it means for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

OK: Final = "ok"
NOTE: Final = "note"
FAILED: Final = "failed"
COLUMNS: Final = ("what", "state", "found")

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: ok; note: training runs, and could run better; failed: it does not run, or not rightly.
        found: what is there, and where something is amiss what to do.
    """

    what: str
    state: State
    found: str


def table_rows(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Rows under `COLUMNS`."""
    return [(finding.what, finding.state, finding.found) for finding in findings]


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Those that must be put right."""
    return [finding for finding in findings if finding.state == FAILED]
