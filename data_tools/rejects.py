"""Rows that were left out: counted by reason, listed with file and line, too many of them an error."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import orjson

from data_tools.dedup import Duplicates
from data_tools.plan import BuildPlan
from data_tools.seal import RowCounter
from data_tools.work import UnitEntry
from llamapro.errors import DataError

DUPLICATE = "duplicate"
NO_DUPLICATES = Duplicates(0, ())
_SHOWN = 5


def reject_counts(entries: Sequence[UnitEntry], duplicates: Duplicates = NO_DUPLICATES) -> dict[str, int]:
    """Rows left out by reason, the most frequent first."""
    total = Counter({DUPLICATE: duplicates.count} if duplicates.count else {})
    for entry in entries:
        total.update(entry.rejects)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def reject_lines(plan: BuildPlan, entries: Sequence[UnitEntry]) -> Iterator[tuple[str, int, str]]:
    """File name, line (or row) from 1 and reason of rows left out: all of them, or the first of each unit."""
    counter = RowCounter(plan)
    for entry in entries:
        first_row = counter.first_row(entry.unit, entry.rows)
        name = plan.files[plan.units[entry.unit].file].name
        for example in entry.examples:
            yield name, first_row + example.row + 1, example.reason


def require_few_rejects(plan: BuildPlan, entries: Sequence[UnitEntry], allowed: float) -> None:
    """Stop a build that leaves out too much, or everything.

    What can't be used whole counts as its share of the text: nobody knows how many rows it would have had.

    Raises:
        DataError: with the reasons and the first rows.
    """
    counts = reject_counts(entries)
    rejected, kept = sum(counts.values()), sum(entry.documents for entry in entries)
    if plan.options.contaminated == "drop":
        contaminated = sum(entry.contaminated for entry in entries)
        _require_clean_documents(kept, contaminated)
        kept += contaminated
    unusable = sum(plan.units[entry.unit].text_bytes for entry in entries if entry.unusable)
    text_share = unusable / max(1, sum(unit.text_bytes for unit in plan.units))
    if kept and rejected <= (allowed - text_share) * (rejected + kept):
        return
    assert kept or rejected, "documents were seen before the build began"
    reasons = "; ".join(f"{count:,} × {reason}" for reason, count in counts.items())
    whole = f", and about {text_share:.2%} of the text with files that are damaged" if unusable else ""
    lines = [f"  {name}:{line}: {reason}" for name, line, reason in reject_lines(plan, entries)]
    flag = plan.options.flag_of_rows
    raise DataError(
        f"{rejected:,} of {rejected + kept:,} rows can't be used{whole}, more than --max-reject-fraction {allowed:g}: "
        f"{reasons}\n" + "\n".join(lines[:_SHOWN]) + f"\ncorrect the inputs, name the right {flag}, or raise "
        "--max-reject-fraction (what is tokenized already is kept)"
    )


def _require_clean_documents(kept: int, contaminated: int) -> None:
    if contaminated and not kept:
        raise DataError(
            f"all {contaminated:,} documents hold text of evaluation items, so nothing is left; name other files as "
            "--decontaminate, or find out what they share with --contaminated report and another --output"
        )


def duplicate_lines(
    plan: BuildPlan, entries: Sequence[UnitEntry], duplicates: Duplicates
) -> Iterator[tuple[str, int, str]]:
    """As `reject_lines`, for the first duplicates of each partition."""
    counter = RowCounter(plan)
    first_rows = {entry.unit: counter.first_row(entry.unit, entry.rows) for entry in entries}

    def place(unit: int, row: int) -> tuple[str, int]:
        return plan.files[plan.units[unit].file].name, first_rows[unit] + row + 1

    for one in duplicates.examples:
        name, line = place(one.first_unit, one.first_row)
        yield *place(one.unit, one.row), f"{DUPLICATE} of {name}:{line}"


def rejects_file(plan: BuildPlan, entries: Sequence[UnitEntry], duplicates: Duplicates) -> bytes:
    """The listed rows as JSON lines."""
    lines = chain(reject_lines(plan, entries), duplicate_lines(plan, entries, duplicates))
    return b"".join(
        orjson.dumps({"file": name, "line": line, "reason": reason}) + b"\n" for name, line, reason in lines
    )
