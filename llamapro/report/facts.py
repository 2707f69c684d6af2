"""What a report page says, as plain values: gathered by `collect` and `overlay`, put into HTML by `page`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from llamapro.report.plots import Plot

Verdict = Literal["", "better", "worse"]
ABSENT = "–"


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Proof:
    """The last comparison of the frozen weights with the record; `whole` when nothing differed."""

    text: str
    whole: bool


@dataclass(frozen=True)
class Cell:
    """A cell of a table; the verdict colours it."""

    text: str
    verdict: Verdict = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        columns: their heads, the first one's included.
        note: a sentence below it.
        of_runs: the columns after the first are runs, each with the colour of its curves.
        of_words: the cells are words, not numbers: they begin at the left.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    of_runs: bool = False
    of_words: bool = False


@dataclass(frozen=True)
class Sample:
    """A piece of text: what the model was shown, or what it wrote.

    Attributes:
        title: whose; `note`: where from.
        parts: the text in pieces, each with whether it is learned, or written by the model.
    """

    title: str
    note: str
    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class SampleGroup:
    """Samples of one kind under their own heading."""

    title: str
    samples: tuple[Sample, ...]
    note: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened, in words; `grave` where a reader must not miss it."""

    time: str
    step: str
    name: str
    details: str
    grave: bool = False


@dataclass(frozen=True)
class Facts:
    """What a page says; what is empty is left out."""

    title: str
    subtitle: str
    cards: tuple[Card, ...] = ()
    proof: Proof | None = None
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    plots_note: str = ""
    samples: tuple[SampleGroup, ...] = ()
    events: tuple[Event, ...] = ()
    earlier_events: int = 0
    configuration: str = ""
    environment: tuple[tuple[str, str], ...] = ()


def number(value: float, form: str) -> str:
    """A formatted number with a real minus sign."""
    return f"{value:{form}}".replace("-", "−")


def with_width(value: float, half_width: float | None, form: str = ".4f") -> str:
    """A number with its interval, where it has one."""
    width = "" if half_width is None else f" ± {half_width:{form.removeprefix('+')}}"
    return number(value, form) + width


def judged(change: float, half_width: float | None = 0.0, *, higher_is_better: bool = False) -> Verdict:
    """What a change is; nothing while its interval holds zero, or where it has none."""
    if half_width is None or abs(change) <= half_width:
        return ""
    return "better" if (change > 0) == higher_is_better else "worse"


def flat(value: Any, show: Callable[[Any], str] = str, prefix: str = "") -> dict[str, str]:
    """Nested settings as text by their dotted paths."""
    if isinstance(value, dict) and value:
        items = [flat(inner, show, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
        return {path: text for item in items for path, text in item.items()}
    return {prefix: ", ".join(map(show, value)) if isinstance(value, list) else show(value)}
